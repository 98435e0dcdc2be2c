"""The tokenizer of a checkpoint directory, read without transformers: its chat template and its mask token."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speculators.errors import ContractError

CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
AGAIN = "fetch or save the target again"
_SPARE = re.compile(r"reserved|unused", re.IGNORECASE)
"""Names of tokens that a vocabulary has in reserve, such as `<|reserved_special_token_0|>` and `<unused0>`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskToken:
    """A token whose embedding can stand for a token to be predicted."""

    id: int
    text: str
    """The token; empty for a row of the embeddings that the tokenizer does not use."""
    in_answers: bool
    """Whether answers contain it: it ends them, or the chat template writes it."""


def chat_template(directory: Path) -> str | None:
    """The chat template that transformers uses by default: a file, or a field that may be a list of named templates.

    Raises:
        ContractError: a file is not JSON, or not UTF-8.
    """
    file = directory / "chat_template.jinja"
    try:
        if file.is_file() and (text := file.read_text(encoding="utf-8")).strip():
            return text
    except UnicodeDecodeError as error:
        raise ContractError(f"target.source: {file} is not UTF-8 ({error})", AGAIN) from None
    for name in (CONFIG, "chat_template.json"):
        template = read_json(directory / name).get("chat_template") if (directory / name).is_file() else None
        if isinstance(template, list):
            template = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        if isinstance(template, dict):
            template = template.get("default")
        if isinstance(template, str) and template.strip():
            return template
    return None


def check_tokenizer(directory: Path) -> None:
    """Parse the files of a checkpoint's tokenizer, and its chat template if jinja2 is installed, with transformers.

    Raises:
        ContractError: a file is not JSON, or the template has a syntax error.
    """
    for name in ("tokenizer.json", CONFIG, GENERATION_CONFIG, SPECIAL_TOKENS):
        _config(directory, name)
    template = chat_template(directory)
    try:
        import jinja2.ext  # it takes a tenth of `plan`
    except ImportError:
        return

    class Generation(jinja2.ext.Extension):
        """The tag `{% generation %}` of transformers."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        jinja2.Environment(extensions=[Generation, jinja2.ext.loopcontrols]).parse(template or "")
    except jinja2.TemplateSyntaxError as error:
        raise ContractError(
            f"target.source: line {error.lineno} of the chat template of {directory} is no Jinja ({error.message})",
            f"correct it in chat_template.jinja or tokenizer_config.json; or {AGAIN}",
        ) from None


def date_variable(template: str) -> tuple[str, str] | None:
    """The variable in place of which a chat template writes today's date, and its format for `strftime`; None if the
    template writes no date, or one that no variable replaces."""
    for name, _, date_format in re.findall(r"set\s+(\w+)\s*=\s*strftime_now\(\s*(['\"])(.*?)\2", template):
        if re.search(rf"\b{name}\s+is\s+(not\s+)?defined", template):
            return name, date_format
    return None


def mask_token(directory: Path, vocab_size: int) -> MaskToken | None:
    """The token that stands for the positions of a block that a draft has yet to fill in.

    The tokenizer's mask token; else the first row of the embeddings that the tokenizer does not use; else a token in
    reserve; else its padding or end token, which occur in no answer before its end. Only ids below `vocab_size`, the
    number of embeddings, count: a tokenizer may have more tokens. None if there is no tokenizer.json.

    Raises:
        ContractError: the tokenizer has none of these, or a file is not JSON.
    """
    if not (directory / "tokenizer.json").is_file():
        return None
    ids = _token_ids(directory)
    texts = {token_id: text for text, token_id in ids.items()}
    unused = max(texts, default=-1) + 1
    special = {name: ids.get(text) for name in ("mask", "pad", "eos") for text in [_special(directory, name)]}
    spare = next((token_id for token_id, text in sorted(texts.items()) if _SPARE.search(text)), None)
    for token_id in (special["mask"], unused, spare, special["pad"], special["eos"]):
        if token_id is not None and token_id < vocab_size:
            text = texts.get(token_id, "")
            ends = {special["eos"], *end_tokens(directory)}
            in_template = bool(text) and text in (chat_template(directory) or "")
            return MaskToken(id=token_id, text=text, in_answers=token_id in ends or in_template)
    raise ContractError(
        f"the tokenizer of {directory} has no token for masks, padding or the end",
        "set speculator.mask_token_id to a token that answers do not use",
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from the target's checkpoint.

    Raises:
        ContractError: the file does not contain one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ContractError(f"target.source: {path} is not JSON ({error})", AGAIN) from None
    if not isinstance(content, dict):
        raise ContractError(f"target.source: {path} contains no JSON object", AGAIN)
    return content


def _token_ids(directory: Path) -> dict[str, int]:
    """Ids of all tokens, added ones included, by text.

    Raises:
        ContractError: the files have another structure than a tokenizer's.
    """
    tokenizer, configured = read_json(directory / "tokenizer.json"), _config(directory, CONFIG)
    try:
        vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
        if isinstance(vocabulary, list):  # of a unigram model: pairs of token and score
            vocabulary = {token: token_id for token_id, (token, _) in enumerate(vocabulary)}
        added = {token["content"]: int(token["id"]) for token in tokenizer.get("added_tokens") or []}
        decoder = configured.get("added_tokens_decoder") or {}
        added |= {token["content"]: int(token_id) for token_id, token in decoder.items()}
        return {**vocabulary, **added}
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ContractError(
            f"target.source: {directory} has no tokens in its tokenizer.json ({error})", AGAIN
        ) from None


def _special(directory: Path, name: str) -> str:
    """Text of a special token; empty if the tokenizer has none."""
    for file in (CONFIG, SPECIAL_TOKENS):
        token = _config(directory, file).get(f"{name}_token")
        if isinstance(token, dict):
            token = token.get("content")
        if token:
            return str(token)
    return ""


def end_tokens(directory: Path) -> Iterator[int]:
    """Ids of the tokens that end an answer."""
    for file in (GENERATION_CONFIG, "config.json"):
        ids = _config(directory, file).get("eos_token_id")
        yield from ids if isinstance(ids, list) else [ids] if ids is not None else []


def _config(directory: Path, file: str) -> dict[str, Any]:
    return read_json(directory / file) if (directory / file).is_file() else {}
