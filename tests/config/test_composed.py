"""What a run composed is found again without Hydra, and only as long as it would come out the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from speculators.config import compose as recipe
from speculators.config import composed, shipped
from speculators.config.schema import Config

WORDS = ["recipe=smollm2_eagle3", "train.lr=3e-4"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where compositions are kept in a test."""
    return tmp_path / "store-composed"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The words that Hydra was asked for."""
    asked: list[list[str]] = []
    compose = recipe.compose

    def counting(words: list[str]) -> Config:
        asked.append(list(words))
        return compose(words)

    monkeypatch.setattr(recipe, "compose", counting)
    return asked


@pytest.mark.parametrize("path", sorted(shipped.RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_what_is_found_is_what_was_composed(path: Path, counted: list[list[str]]) -> None:
    words = [f"recipe={path.stem}", "speculator.num_speculative_tokens=2"]
    kept = composed.compose_cached(words, write=True)
    found = composed.compose_cached(words)
    assert len(counted) == 1
    assert found == kept
    assert type(found.speculator) is type(kept.speculator)


def test_only_a_run_keeps_what_it_composed(place: Path, counted: list[list[str]]) -> None:
    composed.compose_cached(WORDS)
    assert not place.exists()
    composed.compose_cached(WORDS, write=True)
    assert len(list(place.iterdir())) == 1
    composed.compose_cached(WORDS)
    assert len(counted) == 2


def test_other_words_are_composed(counted: list[list[str]]) -> None:
    composed.compose_cached(WORDS, write=True)
    assert composed.compose_cached([*WORDS, "train.lr=1e-4"]).train.lr == 1e-4
    assert composed.compose_cached(WORDS[:1]).train.lr != 3e-4
    assert len(counted) == 3


def test_a_changed_recipe_is_composed_wherever_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list[list[str]]
) -> None:
    text = (shipped.RECIPES / "smollm2_eagle3.yaml").read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    for path, words in ((Path("recipes/own.yaml"), ["recipe=own"]), (Path("other.yaml"), ["recipe=other.yaml"])):
        for count in ("num_conversations: 7", "num_conversations: 8"):
            path.write_text(text.replace("num_conversations: 384", count))
            for _ in range(2):
                assert composed.compose_cached(words, write=True).prompts.num_conversations == int(count[-1])
    assert len(counted) == 4
    Path("other.yaml").unlink()
    with pytest.raises(recipe.RecipeError, match="no recipe at"):
        composed.compose_cached(["recipe=other.yaml"])


def test_a_changed_base_and_a_changed_choice_of_the_working_directory_are_composed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list[list[str]]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("conf/hardware").mkdir(parents=True)
    Path("mine.yaml").write_text("defaults: [base, _self_]")
    own, base = Path("conf/hardware/mine.yaml"), Path("base.yaml")
    lines = ("defaults: [/recipe/smollm2_eagle3, _self_]", "defaults: [/recipe/smollm2_dflash, _self_]")
    for gpus, line in ((1, lines[0]), (2, lines[0]), (2, lines[1])):
        own.write_text(f"gpus: {gpus}")
        base.write_text(line)
        for _ in range(2):
            config = composed.compose_cached(["recipe=mine.yaml", "hardware=mine"], write=True)
            assert (config.hardware.gpus, config.speculator.algorithm) == (gpus, line[26:].split(",")[0][-6:])
    assert len(counted) == 3


def test_the_same_recipe_elsewhere_is_composed_because_its_sources_lie_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        Path("mine.yaml").write_text("target: {source: ./target}")
        config = composed.compose_cached(["recipe=mine.yaml"], write=True)
        assert config.target.source == str(tmp_path / name / "target")


def test_a_changed_choice_and_another_hydra_are_composed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list[list[str]]
) -> None:
    monkeypatch.chdir(tmp_path)
    composed.compose_cached(WORDS, write=True)
    conf = shutil.copytree(shipped.CONF, tmp_path / "shipped")
    monkeypatch.setattr(shipped, "CONF", conf)
    composed.compose_cached(WORDS, write=True)
    assert len(counted) == 2, "another place is another choice"
    (conf / "hardware" / "cpu.yaml").write_text("# changed\n" + (conf / "hardware" / "cpu.yaml").read_text())
    composed.compose_cached(WORDS, write=True)
    assert len(counted) == 3
    (conf / "hardware" / "cpu.yaml").rename(conf / "hardware" / "cpu2.yaml")
    composed.compose_cached(WORDS)
    assert len(counted) == 4, "under another name it is another choice"
    monkeypatch.undo()
    monkeypatch.setattr(composed, "installed_version", lambda name: "0")
    assert composed._cache_path(WORDS) != composed._cache_path([]), "words tell them apart"
    before = composed._cache_path(WORDS)
    monkeypatch.setattr(composed, "installed_version", lambda name: "1")
    assert composed._cache_path(WORDS) != before


def test_what_asks_the_environment_or_sets_hydra_is_composed_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list[list[str]]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (shipped.RECIPES / "smollm2_eagle3.yaml").read_text().replace(": 384}", ': "${oc.env:COUNT}"}')
    Path("asks.yaml").write_text(text)
    for count in (5, 6):
        monkeypatch.setenv("COUNT", str(count))
        assert composed.compose_cached(["recipe=asks.yaml"], write=True).prompts.num_conversations == count
    for _ in range(2):
        composed.compose_cached([*WORDS, "hydra.verbose=false"], write=True)
    assert len(counted) == 4


def test_words_that_are_no_text_are_left_to_whoever_composes() -> None:
    with pytest.raises(recipe.RecipeError, match="cannot read an override"):
        composed.compose_cached([*WORDS, "run.dir=/tmp/\udcff"], write=True)


def test_a_damaged_file_is_as_good_as_none(place: Path, counted: list[list[str]]) -> None:
    expected = composed.compose_cached(WORDS, write=True)
    (path,) = place.iterdir()
    whole = path.read_text()
    for damaged in (whole[:100], ""):
        path.write_text(damaged)
        assert composed.compose_cached(WORDS, write=True) == expected
        assert path.read_text() == whole
    assert len(counted) == 3


def test_the_oldest_go_and_where_nothing_can_be_written_nothing_is_said(
    place: Path, monkeypatch: pytest.MonkeyPatch, counted: list[list[str]]
) -> None:
    monkeypatch.setattr(composed, "CACHE_SIZE", 2)
    for epochs in (1, 2, 3):
        composed.compose_cached([*WORDS, f"train.epochs={epochs}"], write=True)
        os.utime(composed._cache_path([*WORDS, f"train.epochs={epochs}"]) or "", (epochs, epochs))
    assert len(list(place.iterdir())) == 2
    composed.compose_cached([*WORDS, "train.epochs=3"])
    assert len(counted) == 3
    shutil.rmtree(place)
    place.write_text("a file where the directory would be")
    assert composed.compose_cached(WORDS, write=True).train.lr == 3e-4


def test_help_and_what_was_composed_load_no_hydra(tmp_path: Path) -> None:
    composed.compose_cached(WORDS, write=True)
    for words in (["--help"], ["plan", *WORDS]):
        code = f"import sys; sys.argv = ['speculators-run', *{words!r}]\nfrom speculators.cli import main\n"
        code += "try: main()\nexcept SystemExit as stop: assert not stop.code\nassert 'hydra' not in sys.modules\n"
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=tmp_path)
