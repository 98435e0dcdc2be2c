"""Renders conversations by a target's chat template, as a server does for a request.

It imports neither torch nor a model: processes that only render and tokenize stay small.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speculators.errors import SourceError
from speculators.tokenizer_files import end_tokens

Messages = Sequence[Mapping[str, Any]]

_OWN_MASK = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_NOT_OPTIONS = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}
_REASON_CHARS = 160
"""Longest reason of a failed rendering: some templates quote the conversation in it."""


class TemplateError(Exception):
    """The chat template rejects a conversation, or does not put the answer after the prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendering:
    """Options of one conversation's renderings."""

    tools: Sequence[Mapping[str, Any]] | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Equal for renderings whose literal text, apart from the tools themselves, is the same."""
        return json.dumps([bool(self.tools), self.kwargs], sort_keys=True, default=str)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTemplate:
    """A chat template, and the tokens that its text may contain."""

    text: str
    """Jinja source."""
    tool_text: str | None
    """Jinja source for conversations with tools, where the tokenizer has one of its own for them."""
    special_tokens: Mapping[str, str]
    """`bos_token` and others, by the names that templates use."""
    added_tokens: Mapping[str, bool]
    """Tokens that are found in a text before it is split: text -> whether the tokenizer flags it as special."""
    end_tokens: tuple[str, ...]
    """Tokens at which a server stops; the tokenizer's own end-of-sequence token comes first."""

    @property
    def structure(self) -> tuple[str, ...]:
        """Tokens that structure a conversation: special ones and those at which a server stops."""
        special = [token for token, flagged in self.added_tokens.items() if flagged]
        return tuple(dict.fromkeys([*special, *self.end_tokens]))

    def render(self, messages: Messages, rendering: Rendering, *, generation_prompt: bool = False) -> str:
        """Render messages; with `generation_prompt`, the prompt of the answer that follows them.

        Raises:
            TemplateError: the template fails, with whatever exception.
        """
        return self._render(messages, rendering, generation_prompt, own_mask=False)[0]

    def render_with_mask(self, messages: Messages, rendering: Rendering) -> tuple[str, list[tuple[int, int]]]:
        """Render messages; also the spans, in characters, that the template's `generation` blocks mark."""
        return self._render(messages, rendering, False, own_mask=_OWN_MASK.search(self.source(rendering)) is not None)

    def source(self, rendering: Rendering) -> str:
        """The Jinja source for a conversation."""
        return self.tool_text if self.tool_text and rendering.tools else self.text

    def variables(self) -> list[str]:
        """Names of the template's own options, such as `enable_thinking`, sorted."""
        import jinja2.meta

        try:
            tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_OWN_MASK.sub("", self.text))
        except jinja2.TemplateError:  # the first rendering reports it
            return []
        return sorted(jinja2.meta.find_undeclared_variables(tree) - _NOT_OPTIONS - set(self.special_tokens))

    def _render(
        self, messages: Messages, rendering: Rendering, generation_prompt: bool, own_mask: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template
        source = self.source(rendering)
        try:
            texts, spans = render(
                conversations=[[_as_served(message, source) for message in messages]],
                tools=list(rendering.tools) if rendering.tools else None,
                chat_template=source,
                add_generation_prompt=generation_prompt,
                return_assistant_tokens_mask=own_mask,
                **{**self.special_tokens, **rendering.kwargs},
            )
        except Exception as error:  # a template is a program: it fails with TypeError, KeyError and others too
            kind = "" if type(error).__module__.startswith("jinja2") else f"{type(error).__name__}: "
            reason = " ".join(f"{kind}{error}".split())[:_REASON_CHARS]
            raise TemplateError(f"the chat template refuses it: {reason}") from error
        return texts[0], list(spans[0]) if own_mask else []


def _as_served(message: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """The message with its reasoning under the name that the template reads."""
    if not (reasoning := message.get("reasoning_content")) or _REASONING_KEYS[0] in source:
        return message
    key = next((key for key in _REASONING_KEYS[1:] if re.search(rf"\b{key}\b", source)), _REASONING_KEYS[0])
    return {**message, key: reasoning}


def token_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of the tokens, longer ones first, as a tokenizer finds them; for none, it matches nothing."""
    return re.compile("|".join(map(re.escape, sorted(filter(None, tokens), key=len, reverse=True))) or r"(?!)")


def load_chat_template(tokenizer: Any, target: Path) -> ChatTemplate:
    """The chat template of a transformers tokenizer; `target` has the `generation_config.json` that a server reads.

    Raises:
        SourceError: it has none.
    """
    texts = tokenizer.chat_template
    texts = texts if isinstance(texts, dict) else {"default": texts}
    if not texts.get("default"):
        raise SourceError(
            f"the tokenizer in {target} has no chat template, which is needed for conversations that have answers",
            "use an instruction-tuned target, or add a chat_template.jinja to the directory of its weights",
        )
    ends = [tokenizer.eos_token_id, *end_tokens(target)]
    return ChatTemplate(
        text=texts["default"],
        tool_text=texts.get("tool_use"),
        special_tokens=dict(tokenizer.special_tokens_map),
        added_tokens={str(token): token.special for token in tokenizer.added_tokens_decoder.values() if str(token)},
        end_tokens=tuple(dict.fromkeys(t for i in ends if i is not None and (t := tokenizer.convert_ids_to_tokens(i)))),
    )
