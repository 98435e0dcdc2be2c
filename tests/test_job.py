"""The request file: what the runner writes is what the worker reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from speculators.config.fields import select
from speculators.config.schema import Config
from speculators.job import Request, ReusableRows, file_name
from tests.requests import make_request


def test_a_request_is_read_as_it_was_written(tmp_path: Path) -> None:
    request = make_request("train", tmp_path, provenance={"attempt": 2}, inputs={"tokens": "/a"}, digest="d")
    request.write(tmp_path / "request.json")
    assert Request.read(tmp_path / "request.json") == request
    assert request.job().inputs == {"tokens": Path("/a")}


def test_a_job_has_the_rows_that_it_may_reuse(tmp_path: Path) -> None:
    rows = [
        ReusableRows(conversations=tmp_path / "a/conversations.jsonl", hidden_states=tmp_path / "a/states"),
        ReusableRows(conversations=tmp_path / "b/answers.jsonl"),
    ]
    make_request("regenerate", tmp_path, reuse=[each.as_json() for each in rows]).write(tmp_path / "request.json")
    assert Request.read(tmp_path / "request.json").job().reuse == rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "not a request of format 3"),
        ({"phase": None}, "missing or unknown fields: phase"),
        ({"more": 1}, "missing or unknown fields: more"),
    ],
)
def test_a_request_of_another_format_or_with_other_fields_is_refused(
    change: dict[str, int | None], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "request.json"
    make_request("train", tmp_path).write(path)
    fields = json.loads(path.read_text()) | change
    path.write_text(
        json.dumps({name: value for name, value in fields.items() if value is not None or name == "digest"})
    )
    with pytest.raises(ValueError, match=message):
        Request.read(path)


def test_a_jobs_config_has_the_declared_options_alone(tmp_path: Path) -> None:
    request = make_request("train", tmp_path)
    request.config = select(Config(), ("train.seed",))
    config = request.job().config
    assert config.train.seed == Config().train.seed
    with pytest.raises(AttributeError):
        _ = config.train.epochs


def test_names_that_a_user_chose_are_file_names_and_stay_different() -> None:
    names = ["plain_name-1.5", "acme/short-lines", "acme%2Fshort-lines", ".", "..", "%2E", "a b", "ß\n"]
    files = [file_name(name) for name in names]
    assert len(set(files)) == len(names)
    assert files[:2] == ["plain_name-1.5", "acme%2Fshort-lines"]
    assert not [file for file in files if "/" in file or "\n" in file or file.startswith(".")]
