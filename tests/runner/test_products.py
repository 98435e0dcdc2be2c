"""What a run ends in: where its draft is, and commands that work when they are pasted."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from speculators import ui
from speculators.errors import RecipeError, StoreError
from speculators.runner import history, products
from speculators.runner.history import Run
from speculators.runner.store.artifacts import Store
from tests.runner.pasts import past, trained

A, B = "20260101-100000-tiny", "20260101-110000-tiny"


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("runs")


def read(path: Path) -> Run:
    run = history.read_run(path)
    assert run is not None
    return run


def test_a_run_links_its_results_by_name_and_ends_in_commands_that_find_them(runs: Path, store: Store) -> None:
    run = read(trained(runs, A, store))
    for _ in range(2):
        products.link_results(run)
    assert (runs / A / "draft/config.json").is_file()
    assert (runs / A / "evaluation/evaluation.json").is_file()
    assert (runs / A / "metrics").read_text() == "{}\n"
    steps = dict(products.next_steps(run))
    assert steps == {
        "draft": f"runs/{A}/draft",
        "serve": "speculators-run serve 20260101-100000",
        "publish": "speculators-run publish 20260101-100000 tiny-draft",
        "again": "speculators-run recipe=tiny train.lr=1e-3",
    }
    assert products.is_checkpoint(Path(steps["draft"]))
    assert products.in_run(shlex.split(steps["serve"])[-1], runs).node == "train"
    assert max(map(len, ui.labelled(steps.items(), 80).splitlines())) <= 80


def test_a_name_that_is_the_beginning_of_another_is_given_whole_and_a_run_elsewhere_by_its_path(
    runs: Path, store: Store, tmp_path: Path
) -> None:
    one, other = trained(runs, A, store), trained(runs, f"{A}-1", store)
    assert dict(products.next_steps(read(one)))["serve"].endswith(f" {A}")
    assert dict(products.next_steps(read(other)))["serve"].endswith(f" {A}-1")
    far = read(trained(tmp_path / "far away", B, store))
    command = shlex.split(dict(products.next_steps(far))["serve"])
    assert command[-1] == f"far away/{B}"
    assert products.in_run(command[-1], runs).checkpoint == products.of_run(far)[0].checkpoint


def test_a_run_that_did_nothing_names_the_last_one_with_its_draft_or_else_the_artifact(
    runs: Path, store: Store
) -> None:
    trained(runs, A, store)
    run = read(trained(runs, B, store))
    run.stages["train"].path = read(runs / A).stages["train"].path
    shutil.rmtree(run.path)
    steps = dict(products.next_steps(run))
    assert steps["serve"] == "speculators-run serve 20260101-100000"
    assert "publish" in steps
    shutil.rmtree(runs / A)
    steps = dict(products.next_steps(run))
    assert "publish" not in steps
    assert (
        products.find_product(shlex.split(steps["serve"])[-1], runs, store).checkpoint
        == Path(steps["draft"]).absolute()
    )


def test_without_a_name_it_is_the_last_run_that_has_a_draft(runs: Path, store: Store) -> None:
    trained(runs, A, store)
    past(runs, B)
    assert products.find_product("", runs, store).run == read(runs / A)
    with pytest.raises(RecipeError, match=f"the run {B} has no trained draft") as failure:
        products.find_product("last", runs, store)
    assert failure.value.hint == "run it again: speculators-run recipe=tiny train.lr=1e-3"


def test_a_draft_is_found_by_its_artifact_and_by_its_directory(runs: Path, store: Store) -> None:
    product = products.find_product(A, trained(runs, A, store).parent, store)
    assert product.evaluation is not None
    key = product.checkpoint.parents[1].name
    assert products.find_product(f"train:{key[:8]}", runs, store).checkpoint == product.checkpoint
    assert products.find_product(str(product.checkpoint), runs, store).verifier == "org/target"
    with pytest.raises(StoreError, match="0 drafts match `train:zz`"):
        products.find_product("train:zz", runs, store)


def test_of_several_drafts_one_is_chosen_by_its_node(runs: Path, store: Store) -> None:
    run = read(trained(runs, A, store))
    one, other = run.stages["train"], run.stages["evaluate"]
    other.kind, other.path, other.node = "train", one.path, "evaluate"
    products.link_results(run)
    assert (runs / A / "draft-train").is_symlink()
    serve = [command for label, command in products.next_steps(run) if label == "serve"]
    assert serve == [f"speculators-run serve 20260101-100000:{node}" for node in ("train", "evaluate")]
    publish = [shlex.split(command)[-1] for label, command in products.next_steps(run) if label == "publish"]
    assert publish == ["tiny-train-draft", "tiny-evaluate-draft"], "each into a directory of its own"
    with pytest.raises(RecipeError, match="no draft of `vocab`"):
        products.in_run(A, runs, "vocab")


def test_a_draft_whose_artifact_is_gone_is_not_offered(runs: Path, store: Store) -> None:
    run = read(trained(runs, A, store))
    key = Path(run.stages["train"].path).parent.name
    assert store.quarantine("train", key) is not None
    products.link_results(run)
    assert not (runs / A / "draft").exists()
    assert [label for label, _ in products.next_steps(run)] == ["again"]


def test_a_draft_of_a_run_that_did_nothing_is_named_by_its_node_in_the_other_run(runs: Path, store: Store) -> None:
    trained(runs, A, store)
    report = json.loads((runs / A / "run.json").read_text())
    report["steps"]["other"] = {**report["steps"].pop("evaluate"), "path": ""}
    report["steps"]["second"] = report["steps"]["train"]
    (runs / A / "run.json").write_text(json.dumps(report))
    run = read(trained(runs, B, store))
    run.stages["train"].path = report["steps"]["train"]["path"]
    shutil.rmtree(run.path)
    serve = dict(products.next_steps(run))["serve"]
    assert products.find_product(shlex.split(serve)[-1], runs, store).checkpoint == Path(
        run.stages["train"].path, "best"
    )
