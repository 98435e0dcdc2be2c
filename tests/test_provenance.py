"""What is written down about an artifact: enough to rebuild it, and no secret."""

from __future__ import annotations

import getpass
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from speculators import cli
from speculators.config.compose import compose
from speculators.errors import RecipeError
from speculators.provenance import Provenance
from speculators.runner.servers import vllm
from speculators.runner.store.artifacts import Store
from tests.loopback import reporting

DEMO = "recipe=smollm2_eagle3"
PLANTED = {"HF_TOKEN": "hf_planted0000", "PLANTED_KEY": "sk-planted1111", "AWS_SECRET_ACCESS_KEY": "planted2222"}


def git(*words: str, cwd: Path) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    return subprocess.run(
        ["git", *identity, *words], cwd=cwd, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_it_says_who_where_and_with_what(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    facts = Provenance().facts()
    assert facts["user"] == getpass.getuser()
    assert facts["directory"] == str(tmp_path)
    assert facts["versions"]["pytest"] == pytest.__version__
    assert "json" not in facts["versions"]  # the standard library's is python's
    assert facts["memory_bytes"] > 1 << 28
    assert isinstance(facts["gpus"], list)
    assert json.loads(json.dumps(facts)) == facts


def test_variables_are_named_and_their_values_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    facts = Provenance().facts()
    assert set(PLANTED) <= set(facts["environment"])
    assert "planted" not in json.dumps(facts)


def test_git_is_the_commit_and_whether_the_files_are_still_its(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git("init", "-q", cwd=tmp_path)
    (tmp_path / "recipe.yaml").write_text("a")
    git("add", ".", cwd=tmp_path)
    git("commit", "-qm", "one", cwd=tmp_path)
    git("remote", "add", "origin", "https://user:planted@host/x", cwd=tmp_path)
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    (tmp_path / "untracked").touch()
    clean = Provenance().facts()["git"]["directory"]
    assert clean == {"commit": git("rev-parse", "HEAD", cwd=tmp_path), "dirty": False}
    (tmp_path / "recipe.yaml").write_text("b")
    before = Provenance()
    (tmp_path / "recipe.yaml").write_text("a")
    assert before.facts()["git"]["directory"]["commit"] == clean["commit"]
    (tmp_path / "recipe.yaml").write_text("c")
    assert Provenance().facts()["git"]["directory"]["dirty"] is True


def test_outside_of_git_and_without_git_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "directory" not in Provenance().facts()["git"]
    monkeypatch.setenv("PATH", "/nowhere")
    assert Provenance().facts()["git"] == {}


def test_no_file_of_a_run_or_of_the_store_holds_a_secret(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that makes one artifact and then fails at a server that is not ours."""
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    turns = [{"from": "human", "value": "What is the capital of France, and why?"}, {"from": "gpt", "value": "Paris."}]
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"id": f"r{i}", "conversations": [*turns[:1], turns[1]]} for i in range(3)]))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "states").mkdir()
    words = [DEMO, f"target.source={checkpoint}", f"data.sharegpt.source={rows}", "evaluate.datasets=[sharegpt]"]
    words += ["target.num_hidden_layers=4", "target.hidden_size=8", "target.vocab_size=32", "vocab.size=16"]
    words += [
        "speculator.target_layer_ids=[0,1,2]",
        f"serve.url=http://127.0.0.1:{reporting().server_port}",
        "serve.api_key_env=PLANTED_KEY",
        "serve.hidden_states_dir=states",
    ]
    assert cli._guarded(words) == 1
    assert "refuses the API key" in capsys.readouterr().err
    (made,) = Store(tmp_path / "store").artifacts("prompts")
    assert "PLANTED_KEY" in made.provenance["environment"]
    assert made.provenance["words"] == words
    assert made.provenance["options"]["prompts"]["num_conversations"] == 384
    files = [path for root in ("runs", "store") for path in (tmp_path / root).rglob("*") if path.is_file()]
    assert {"config.json", "events.jsonl", "run.json", "artifact.json"} <= {path.name for path in files}
    assert [path for path in files if any(value.encode() in path.read_bytes() for value in PLANTED.values())] == []


@pytest.mark.parametrize(
    "word",
    [
        "serve.url=http://me:planted@host:8000",
        "serve.extra_urls=[http://me:planted@host:8000]",
        "serve.extra_args=[--api-key,planted]",
    ],
)
def test_a_secret_in_a_recipe_is_refused_without_repeating_it(word: str) -> None:
    with pytest.raises(RecipeError, match="contains a secret") as raised:
        compose([DEMO, word])
    assert "planted" not in raised.value.message + raised.value.hint


def test_a_servers_key_is_in_no_argument_that_every_user_can_see(tmp_path: Path) -> None:
    place = str(tmp_path)
    order = vllm.ServerOrder(
        config=compose([DEMO]),
        mode="baseline",
        dtype="float32",
        target=place,
        max_model_len=8,
        directories=place,
        logs=place,
    )
    spec = vllm.make_server(order, {}).spec
    assert spec.api_key
    assert spec.api_key not in " ".join(spec.argv) + repr(spec)


def test_provenance_loads_nothing_heavy() -> None:
    code = (
        "import sys, speculators.provenance as p; p.Provenance().facts(); print({'torch', 'rich'} & set(sys.modules))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
