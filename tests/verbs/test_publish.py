"""publish: what is written into a directory, and what the hub is given."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from speculators import cli
from speculators.config import compose
from speculators.config.fields import to_builtins
from speculators.runner.store.artifacts import Store
from tests.runner.pasts import trained

A = "20260101-100000-tiny"
FILES = ["README.md", "config.json", "evaluation.json", "model.safetensors", "recipe.yaml"]


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Hub:
    """Stands in for `HfApi`: what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def create_repo(self, repository: str, exist_ok: bool) -> None:
        self.calls.append(("create_repo", repository))

    def create_commit(self, repository: str, operations: list[Any], commit_message: str) -> SimpleNamespace:
        self.calls.append((repository, {o.path_in_repo: o.path_or_fileobj for o in operations}))
        return SimpleNamespace(commit_url=f"https://hub/{repository}/commit/1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    return hub


def test_a_directory_gets_the_checkpoint_its_card_figures_and_recipe(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(Path("runs"), A, store)
    (run / "lock.json").write_text(json.dumps({"stages": {"target": {"in_key": {"target.source.revision": "abc"}}}}))
    assert cli._guarded(["publish", "last", "out/draft"]) == 0
    assert capsys.readouterr().out == "serve    speculators-run serve out/draft\n"
    directory = Path("out/draft")
    assert sorted(path.name for path in directory.iterdir()) == sorted([*FILES, "recipe.lock.json"])
    config = json.loads((directory / "config.json").read_text())["speculators_config"]
    assert config["verifier"]["name_or_path"] == "org/target"
    assert config["proposal_methods"][0]["speculative_tokens"] == 3, "as evaluated"
    assert (directory / "model.safetensors").read_text() == "weights"
    card = (directory / "README.md").read_text()
    for words in ("base_model: \"org/target\"", "vllm serve out/draft", "| human_eval | 3 | 1 | 1.50", "revision `abc`",
                  "speculators-run recipe=tiny train.lr=1e-3"):  # fmt: skip
        assert words in card
    assert cli._guarded(["publish", "last", "out/draft"]) == 1, "nothing is overwritten"


def test_the_recipe_that_is_published_composes_to_the_options_of_the_run(store: Store) -> None:
    run = trained(Path("runs"), A, store)
    assert cli._guarded(["publish", A, "draft"]) == 0
    again = to_builtins(compose.compose(["recipe=draft/recipe.yaml"]))
    made = json.loads((run / "config.json").read_text())
    assert {name for name in made if made[name] != again[name]} == {"recipe"}
    assert "stores_read" not in Path("draft/recipe.yaml").read_text()


def test_a_dry_run_lists_files_and_sizes_and_writes_and_asks_for_nothing(
    store: Store, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(Path("runs"), A, store)
    for place in ("draft", "hub:me/draft"):
        assert cli._guarded(["publish", "last", place, "--dry-run"]) == 0
        out = capsys.readouterr().out
        assert sorted(line.split()[0] for line in out.splitlines()) == FILES
        assert "model.safetensors      7 B" in out
    assert not Path("draft").exists()
    assert hub.calls == []


def test_the_hub_gets_one_commit_of_the_same_files(store: Store, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    trained(Path("runs"), A, store, verifier="/local/target", measured=False)
    assert cli._guarded(["publish", "last", "hub:me/draft"]) == 1
    err = capsys.readouterr().err
    assert "error: the draft's target is `/local/target`, which is on this machine only" in err
    assert hub.calls == []
    assert cli._guarded(["publish", "last", "hub:me/draft", "verifier=org/target"]) == 0
    assert "https://hub/me/draft/commit/1" in capsys.readouterr().err
    (created, (repository, files)) = hub.calls
    assert created == ("create_repo", "me/draft")
    assert repository == "me/draft"
    assert sorted(files) == [name for name in FILES if name != "evaluation.json"]
    assert json.loads(files["config.json"])["speculators_config"]["verifier"]["name_or_path"] == "org/target"
    assert b"vllm serve me/draft" in files["README.md"]
    assert b"Evaluation" not in files["README.md"]


def test_a_hub_that_refuses_is_one_error(
    store: Store, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(Path("runs"), A, store)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("401 Client Error: no token\n\nmore")

    monkeypatch.setattr(hub, "create_repo", refuse)
    assert cli._guarded(["publish", "last", "hub:me/draft"]) == 1
    err = capsys.readouterr().err
    assert "error: the hub does not take me/draft: 401 Client Error: no token\n" in err
    assert "hf auth login" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["last"], "`publish` needs a run and a destination"),
        (["last", "hub:nowhere"], "`hub:nowhere` is not hub:ORG/NAME"),
        (["last", "draft", "private=true"], "`publish` has no option `private`"),
    ],
)
def test_what_cannot_be_published_is_one_error(
    words: list[str], message: str, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(Path("runs"), A, store)
    assert cli._guarded(["publish", *words]) == 1
    assert f"error: {message}" in capsys.readouterr().err


def test_a_target_given_by_a_relative_path_is_written_as_an_absolute_one_and_is_no_hub_id(
    store: Store, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(Path("runs"), A, store)
    Path("target").mkdir()
    assert cli._guarded(["publish", "last", "draft", "verifier=./target"]) == 0
    config = json.loads(Path("draft/config.json").read_text())["speculators_config"]
    assert config["verifier"]["name_or_path"] == str(tmp_path / "target")
    assert cli._guarded(["publish", "last", "hub:me/draft", "verifier=../target"]) == 1
    assert "error: the draft's target is `../target`, which is on this machine only" in capsys.readouterr().err
    assert hub.calls == []


def test_a_name_with_blanks_can_be_pasted_into_a_shell_and_the_target_is_found_from_anywhere(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(Path("runs"), A, store)
    Path("my target").mkdir()
    assert cli._guarded(["publish", "last", "my draft", "verifier=my target"]) == 0
    assert capsys.readouterr().out == "serve    speculators-run serve 'my draft'\n"
    assert "vllm serve 'my draft'\n" in Path("my draft/README.md").read_text()
    config = json.loads(Path("my draft/config.json").read_text())["speculators_config"]
    assert config["verifier"]["name_or_path"] == str(Path("my target").absolute())
    assert cli._guarded(["publish", "last", "x" * 300]) == 1
    assert "error: cannot write" in capsys.readouterr().err
