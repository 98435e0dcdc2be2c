"""The words that `docs/concepts/glossary.md` rules out are nowhere in the package, its configuration or its pages.

`python -m tests.test_words [PATH...]` lists each use with its file and line.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
GLOSSARY = ROOT / "docs/concepts/glossary.md"
PLACES = ("variable", "name", "text")


class Rule(NamedTuple):
    """A row of the deny-list."""

    words: str
    where: str
    """`variable`: a variable or parameter of exactly this name; `name`: any identifier that has the words among its
    parts; `text`: docstrings, comments, string literals and pages."""
    use: str
    allowed: str
    """A regular expression: text that it matches is left out before the search, and so are the files that it names."""


class Use(NamedTuple):
    """A use of a word that is ruled out."""

    path: str
    line: int
    rule: Rule
    excerpt: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.excerpt.strip()[:80]}  [{self.rule.words} -> {self.rule.use}]"


@cache
def rules() -> list[Rule]:
    """The deny-list: the rows of the glossary's second table, one rule for each of the words in a row."""
    table = GLOSSARY.read_text().split("## Deny-list")[1]
    lines = [line.strip("|") for line in table.splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines]
    return [
        Rule(words, where, use, re.sub("^`+|`+$", "", allowed).replace(r"\|", "|"))
        for cells, wheres, use, allowed in rows
        for words in re.findall(r"`([^`]+)`", cells)
        for where in wheres.split(", ")
    ]


def parts(name: str) -> str:
    """An identifier's words, lower case, with spaces between and around them."""
    return " " + re.sub(r"[_\s]+", " ", re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name)).strip().lower() + " "


def matches(rule: Rule, kind: str, text: str) -> bool:
    if rule.where == "variable":
        return kind == "variable" and text == rule.words
    if rule.where == "name":
        return kind in ("variable", "name") and f" {rule.words.replace('_', ' ')} " in parts(text)
    return kind == "text" and re.search(rf"(?<![\w./-]){rule.words}(?![\w-]|\.\w|/)", text, re.IGNORECASE) is not None


def python_phrases(source: str) -> Iterator[tuple[str, int, str]]:
    """(kind, line, phrase) of each name that a module binds and of each of its strings and comments."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield "variable", node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield "variable", node.lineno, node.arg
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield "name", node.lineno, node.attr
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield "name", node.lineno, node.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from (("text", node.lineno + i, line) for i, line in enumerate(node.value.splitlines()))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield "text", token.start[0], token.string


def page_phrases(source: str) -> Iterator[tuple[str, int, str]]:
    """(kind, line, phrase) of a page's or a configuration file's lines."""
    return (("text", number, line) for number, line in enumerate(source.splitlines(), 1))


def uses(path: str, source: str) -> list[Use]:
    """The uses of words that are ruled out in a file, `path` relative to the project's root."""
    phrases = python_phrases(source) if path.endswith(".py") else page_phrases(source)
    found = []
    for kind, line, phrase in phrases:
        for rule in rules():
            if rule.allowed and re.search(rule.allowed, path):
                continue
            text = re.sub(rule.allowed, "", phrase, flags=re.IGNORECASE) if rule.allowed else phrase
            if matches(rule, kind, text):
                found.append(Use(path, line, rule, phrase))
    return found


def files() -> list[Path]:
    package = [*(ROOT / "speculators").rglob("*.py"), *(ROOT / "speculators").rglob("*.yaml")]
    pages = [
        ROOT / "README.md",
        ROOT / "Makefile",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "speculators").rglob("*.md"),
    ]
    return sorted(p for p in [*package, *pages] if p not in (GLOSSARY, ROOT / "docs/log.md"))


def all_uses(within: str = "") -> list[Use]:
    named = [(str(path.relative_to(ROOT)), path) for path in files()]
    return [use for name, path in named if name.startswith(within) for use in uses(name, path.read_text())]


def test_no_word_that_the_glossary_rules_out_is_used() -> None:
    assert [str(use) for use in all_uses()] == []


PLANTED = {
    "variable": [("variable", "{name} = 1\n")],
    "name": [
        ("a variable", "old_{name}_1 = 1\n"),
        ("a function", "def get_{name}() -> None: ...\n"),
        ("a class", "class {title}: ...\n"),
        ("an attribute", "x.{name}_count = 1\n"),
    ],
    "text": [
        ("a docstring", '"""The {text} of it."""\n'),
        ("a comment", "x = 1  # the {text} of it\n"),
        ("a message", 'raise ValueError(f"{{x}}: {text} is wrong")\n'),
    ],
}


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: f"{rule.words}-{rule.where}".replace(" ", "_"))
def test_each_word_is_caught_where_it_is_ruled_out(rule: Rule) -> None:
    words = {"name": rule.words.replace(" ", "_"), "text": rule.words, "title": rule.words.title().replace("_", "")}
    for what, source in PLANTED[rule.where]:
        planted = source.format(**words)
        assert rule in [use.rule for use in uses("speculators/planted.py", planted)], (what, planted)
    if rule.where == "text":
        assert rule in [use.rule for use in uses("docs/planted.md", f"Line one.\nThe {rule.words} of it.\n")]
        assert rule in [use.rule for use in uses("conf/planted.yaml", f"a: 1  # {rule.words}\n")]


def test_a_good_file_is_not_blamed() -> None:
    source = '"""Hidden states in place."""\nhidden_states = read(path)\nplace_holder = 3  # decimal places\n'
    assert uses("speculators/planted.py", source.replace("place_holder", "placeholder")) == []


if __name__ == "__main__":
    for path in sys.argv[1:] or [""]:
        print(*all_uses(path), sep="\n")
