"""The wheel carries everything: installed alone in an empty environment, it plans a recipe from anywhere."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.loopback import reporting

ROOT = Path(__file__).parent.parent


@pytest.mark.timeout(600)
def test_a_wheel_in_an_empty_environment_plans_a_recipe_from_another_directory(tmp_path: Path) -> None:
    def run(*words: str | Path) -> str:
        done = subprocess.run([str(w) for w in words], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", ROOT)
    wheel = next((tmp_path / "dist").glob("*.whl"))
    with zipfile.ZipFile(wheel) as file:
        sources = {Path(name).name for name in file.namelist() if name.startswith("speculators/ops/")}
    assert sources == {path.name for path in (ROOT / "speculators" / "ops").iterdir() if path.is_file()}
    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", wheel)
    command = tmp_path / "empty" / "bin" / "speculators-run"
    assert "smollm2_eagle3" in run(command, "--help")
    # The environment is empty, so the engines have to be somebody else's.
    url, other = (f"http://127.0.0.1:{reporting().server_port}" for _ in range(2))
    elsewhere = (f"serve.url={url}", f"serve.hidden_states_dir={tmp_path}")
    elsewhere += (f"serve.baseline_url={url}", f"serve.speculative_url={other}")
    out = run(command, "plan", "recipe=smollm2_eagle3", *elsewhere, f"run.store={tmp_path}/store")
    assert "upstream: train" in out
    assert not (tmp_path / "store").exists()
