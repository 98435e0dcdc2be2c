"""Finds the answers in rendered conversations: the text that the target would have sampled after a server's prompt.

A chat template is a program, and no two agree on what they write around an answer. Nothing here knows a template by
name. What a template does is found by rendering it: a conversation with and without its last answer, short
conversations with markers in the place of texts, and the same with the template's options set otherwise.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from speculators.data.chat_template import ChatTemplate, Messages, Rendering, TemplateError, token_pattern

OWN_MASK = "template's own mask"
DIFFERENCE = "difference of renderings"
SHARED = "what prompt and data share"
"""How the beginning of an answer was found; the keys of `record["masks"]`."""

_MARKERS = [f"~k{letter}qzx~" for letter in "abcdefgh"]
_OPENED = re.compile(r"(?:<(?!/)[^<>/]*[^<>/|]>|\[[A-Z_]+\])\s*$")
"""The end of a text that opens a section, `<think>`; not of one that closes one, `</think>` or `<channel|>`."""

_THOUGHT_END = re.compile(r"</[\w:]*think\w*>|<channel\|>|\[/THINK\]")
"""The end of a thought in the content of a message, which templates cut off there."""
_THOUGHT_CLOSED = re.compile(rf"(?:{_THOUGHT_END.pattern})\s*$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """One answer in a text, in characters."""

    prompt_end: int
    """The prompt, as a server renders it, is the text before."""
    start: int
    """Where the answer begins: after the prompt, and after what the template adds and the target did not sample."""
    end: int
    """After the end-of-turn token."""


@dataclass(kw_only=True, slots=True)
class AnsweredText:
    """A rendered text with the answers in it; each one's prompt is the text before it."""

    text: str
    spans: list[Span]
    literal: list[tuple[int, int]] = field(default_factory=list)
    """Texts of answers in which a special token is spelled: the target sampled its characters, not the token."""


@dataclass(frozen=True, slots=True)
class _Ending:
    """What a template writes after an answer that ends a conversation: `tail` follows the end-of-turn token. Where it
    writes no such token, `added` is what the target samples at the end."""

    tail: str
    added: str


@dataclass(frozen=True, slots=True)
class _Layout:
    """The literal text between the messages of a conversation, for templates that never rewrite what came before."""

    before_answer: str
    after_answer: str
    prompt_end: int
    """Where the prompt ends in `before_answer`, counted from its end; `start` and `end` are from there too."""
    start: int
    closing: str
    """What the target samples after an answer's text, through the end-of-turn token."""
    at_end: str
    """What the template writes after the text of the last answer."""
    method: str


class AnswerFinder:
    """Finds the answers of conversations in what a template renders; `counts` has the methods and what they met."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self.counts: Counter[str] = Counter()
        self._layouts: dict[str, _Layout | None] = {}
        self._endings: dict[str, _Ending] = {}
        self._scaffold_lists: dict[str, list[str]] = {}
        self._added = token_pattern(template.added_tokens)
        self._structure = token_pattern(template.structure)

    def texts(self, messages: Messages, rendering: Rendering) -> list[AnsweredText]:
        """Render a conversation: one text where each prompt begins with all before it, else as many as it takes.

        Answers before the first user message are context.

        Raises:
            TemplateError: the template cannot be used for this conversation.
        """
        roles = [message["role"] for message in messages]
        first = roles.index("user") if "user" in roles else len(roles)
        answered = [i for i, m in enumerate(messages) if i > first and m["role"] == "assistant" and _has_answer(m)]
        if not answered:
            return []
        if text := self._whole(messages[: answered[-1] + 1], first, rendering):
            return [text]
        joined: list[AnsweredText] = []
        for i in answered:
            answer = self._answer(messages, i, rendering)
            last = joined[-1] if joined else None
            if last and not last.literal and answer.text.startswith(last.text[: last.spans[-1].end]):
                answer.spans[:0] = last.spans
                joined[-1] = answer
            else:
                joined.append(answer)
        return joined

    def _answer(self, messages: Messages, i: int, rendering: Rendering) -> AnsweredText:
        """Render message `i` with its prompt."""
        prompt = self.template.render(messages[:i], rendering, generation_prompt=True)
        message = self._without_thought(messages[i], prompt)
        messages = [*messages[:i], message]
        finished, own_mask = self.template.render_with_mask(messages, rendering)
        if finished.startswith(prompt):
            method, rest = DIFFERENCE, finished[len(prompt) :]
        else:
            method, rest = SHARED, self._after_shared(messages, i, prompt, finished, rendering)
        unsaid, shared = "", len(finished) - len(rest)
        if marked := [first for first, end in own_mask if end > shared]:
            method, unsaid = OWN_MASK, finished[shared : marked[0]]
            rest = finished[max(shared, marked[0]) :]
        if not message.get("reasoning_content"):
            scaffold = self._scaffold(rest, str(message["content"]), rendering)
            unsaid, rest = unsaid + scaffold, rest[len(scaffold) :]
        answer = self._closed(rest, "tools" if message.get("tool_calls") else "text", rendering)
        self._check(message, answer)
        self.counts[method] += 1
        text = prompt + unsaid + answer
        begin = len(prompt) + len(unsaid)
        span = Span(prompt_end=len(prompt), start=begin, end=len(text))
        return AnsweredText(text=text, spans=[span], literal=self._spelled(message, text, begin))

    def _without_thought(self, message: Mapping[str, Any], prompt: str) -> Mapping[str, Any]:
        """The message without its reasoning, where the prompt has closed the thought: the target cannot say it."""
        content = str(message["content"])
        remaining = _THOUGHT_END.split(content)[-1].lstrip()
        if not _THOUGHT_CLOSED.search(prompt) or not (
            message.get("reasoning_content") or remaining != content.lstrip()
        ):
            return message
        if not remaining and not message.get("tool_calls"):
            raise TemplateError("an answer is nothing but a thought, which the prompt has closed")
        self.counts["answers without their reasoning: the prompt closes the thought"] += 1
        return {key: value for key, value in message.items() if key != "reasoning_content"} | {"content": remaining}

    def _after_shared(self, messages: Messages, i: int, prompt: str, finished: str, rendering: Rendering) -> str:
        """The part of `finished` after what it shares with `prompt`, where it does not begin with it: both are compared
        from the end of the message before."""
        a, b, c = _MARKERS[:3]
        before, message = {**messages[i - 1], "content": a}, messages[i]
        context = [*messages[: i - 1], before]
        header = _after(self.template.render(context, rendering, generation_prompt=True), a)
        body = _after(self.template.render([*context, message], rendering), a)
        if header is None or body is None or not (prompt.endswith(header) and finished.endswith(body)):
            raise TemplateError("the chat template changes the prompt when the answer is added")
        marked = {**message, **({"content": b} if message["content"] else {})}
        if reasoning := message.get("reasoning_content"):
            marked["reasoning_content"] = c
        pattern = _after(self.template.render([*context, marked], rendering), a) or ""
        shared, content = _shared(header, pattern), str(message["content"]).strip()
        if _OPENED.search(header[shared:]):
            if (reasoning and c not in pattern) or (_THOUGHT_END.search(content) and content not in body):
                raise TemplateError("the chat template opens a thought, and leaves out the reasoning of the answer")
            if pattern[shared:].lstrip().startswith(b):
                self.counts["answers without reasoning after a prompt that opens a thought"] += 1
        # What the template writes before the text may end the prompt too, after something that history lacks.
        before_text = re.split("|".join(map(re.escape, (b, c))), pattern[shared:])[0]
        both = before_text != pattern[shared:] and header[shared:].endswith(before_text)
        return body[shared + len(before_text) * both :]

    def _scaffold(self, rest: str, content: str, rendering: Rendering) -> str:
        """What `rest` begins with that the template adds by an option or for want of reasoning: it was not sampled."""
        for scaffold in self._scaffolds(rendering):
            if rest.startswith(scaffold) and not content.lstrip().startswith(scaffold.strip()):
                return scaffold
        return ""

    def _scaffolds(self, rendering: Rendering) -> list[str]:
        """What a server would write before an answer under other options, and thoughts that are empty."""
        if (known := self._scaffold_lists.get(rendering.key)) is not None:
            return known
        a, b, c = _MARKERS[:3]
        question, answer = {"role": "user", "content": a}, {"role": "assistant", "content": b}
        header = self._between([question], a, None, rendering, generation_prompt=True) or ""
        scaffolds: list[str] = []
        for name in self.template.variables():
            for value in (False, True):
                other = Rendering(tools=rendering.tools, kwargs={**rendering.kwargs, name: value})
                changed = self._between([question], a, None, other, generation_prompt=True) or ""
                shared = _shared(header, changed)
                if header and header in changed:
                    shared = changed.rindex(header) + len(header)
                if shared and changed[shared:].strip() and not _OPENED.search(changed[shared:]):
                    scaffolds.append(changed[shared:])
        empty = self._between([question, answer], a, b, rendering) or ""
        thought = self._between([question, {**answer, "reasoning_content": c}], a, b, rendering) or ""
        if c in thought and "".join(thought.replace(c, "").split()) == "".join(empty.split()):
            frame = empty[_shared(header, empty) :]
            scaffolds += [frame] if frame.strip() else []
        return self._scaffold_lists.setdefault(rendering.key, list(dict.fromkeys(scaffolds)))

    def _closed(self, rest: str, kind: str, rendering: Rendering) -> str:
        """`rest` through its end-of-turn token, once, and nothing after it."""
        ending = self._ending(kind, rendering)
        if ending.added or rest.endswith(ending.tail):
            body = rest[: len(rest) - len(ending.tail)] if rest.endswith(ending.tail) else rest.rstrip()
            if ending.added or body.endswith(tuple(self.template.added_tokens)):
                return body + ending.added
        ends = [m.end() for m in self._added.finditer(rest) if m[0] in self.template.end_tokens]
        if not ends and not self.template.end_tokens:
            raise TemplateError("neither the chat template nor the tokenizer has an end-of-turn token")
        return rest[: ends[-1]] if ends else rest.rstrip() + self.template.end_tokens[0]

    def _ending(self, kind: str, rendering: Rendering) -> _Ending:
        key = kind + rendering.key
        if key in self._endings:
            return self._endings[key]
        a, b, c = _MARKERS[:3]
        question, answer = {"role": "user", "content": a}, {"role": "assistant", "content": b}
        follow_up: dict[str, Any] = {"role": "user", "content": c}
        if kind == "tools":
            call = {"id": "call00000", "type": "function", "function": {"name": "probe", "arguments": {"x": b}}}
            answer = {"role": "assistant", "content": "", "tool_calls": [call]}  # type: ignore[dict-item]
            follow_up = {"role": "tool", "content": c, "name": "probe", "tool_call_id": "call00000"}
        at_end = self._between([question, answer], b, None, rendering) or ""
        inside = self._between([question, answer, follow_up], b, c, rendering) or ""
        return self._endings.setdefault(key, self._ending_of(at_end, inside, kind == "text"))

    def _ending_of(self, at_end: str, inside: str, is_text: bool) -> _Ending:
        """Tell the end-of-turn token by what follows an answer at the end of a conversation and inside of one."""
        end_tokens = {*self.template.end_tokens}
        common = _common_length(at_end, inside)
        tokens_at_end, tokens_inside = list(self._added.finditer(at_end)), list(self._added.finditer(inside))
        special = self.template.added_tokens
        for candidates, accepted in (
            ([m for m in tokens_at_end if m.end() <= common], end_tokens),
            ([m for m in tokens_at_end if m.end() <= common], {t for t in special if special[t] or is_text}),
            (tokens_at_end, end_tokens),
        ):
            if token := next((m for m in candidates if m[0] in accepted), None):
                return _Ending(at_end[token.end() :], "")
        follows = next((m for m in tokens_inside if m[0] in end_tokens), None)
        follows = follows or next((m for m in tokens_inside if special[m[0]] and not inside[: m.start()].strip()), None)
        follows = follows or next((m for m in tokens_inside if special[m[0]]), None) if not is_text else follows
        if follows and inside.startswith(at_end):
            return _Ending("", inside[len(at_end) : follows.end()])
        if token := next((m for m in tokens_at_end if special[m[0]] or is_text), None):
            return _Ending(at_end[token.end() :], "")
        return _Ending(at_end, "".join(self.template.end_tokens[:1]))

    def _whole(self, messages: Messages, first: int, rendering: Rendering) -> AnsweredText | None:
        """Find all answers of a conversation of plain messages in one rendering; None where that cannot be done."""
        talk = messages[first:]
        contents = [str(message["content"]) for message in talk]
        if any(m["role"] != ("assistant" if k % 2 else "user") or len(m) > 2 for k, m in enumerate(talk)):
            return None
        if len(talk) % 2 or any(m["role"] != "system" for m in messages[:first]):
            return None
        if not all(map(str.strip, contents)) or any(map(self._structure.search, contents[1::2])):
            return None
        layout = self._layout(bool(first), rendering)
        if layout is None:
            return None
        finished = self.template.render(messages, rendering)
        prompt = self.template.render(messages[:-1], rendering, generation_prompt=True)
        for texts in (contents, [text.strip() for text in contents]):
            parts = [
                part
                for k, t in enumerate(texts)
                for part in (layout.before_answer if k % 2 else layout.after_answer, t)
            ]
            conversation = "".join(parts[1:])
            if finished.endswith(conversation + layout.at_end):
                break
        else:
            return None
        position = len(finished) - len(conversation) - len(layout.at_end)
        text = finished[:position] + conversation + layout.closing
        spans = []
        for k, part in enumerate(parts[1:]):
            position += len(part)
            if k % 4 == 2:
                start, end = position - len(part), position + len(layout.closing)
                spans.append(Span(prompt_end=start - layout.prompt_end, start=start - layout.start, end=end))
        if text[: spans[-1].prompt_end] != prompt:
            return None
        self.counts[layout.method] += len(spans)
        return AnsweredText(text=text, spans=spans)

    def _layout(self, system: bool, rendering: Rendering) -> _Layout | None:
        key = f"{system} {rendering.key}"
        if key not in self._layouts:
            counts, self.counts = self.counts, Counter()
            try:
                self._layouts[key] = self._learned_layout(system, rendering)
            except TemplateError:
                self._layouts[key] = None
            self.counts = counts
        return self._layouts[key]

    def _learned_layout(self, system: bool, rendering: Rendering) -> _Layout | None:
        """Render a conversation of three answers; its layout if each prompt begins with all that came before."""
        talk = [{"role": "assistant" if k % 2 else "user", "content": _MARKERS[k]} for k in range(6)]
        messages = [{"role": "system", "content": _MARKERS[6]}] * system + talk
        answers = [self._answer(messages, i, rendering) for i in range(system + 1, system + 6, 2)]
        texts = [answer.text for answer in answers]
        if not (texts[1].startswith(texts[0]) and texts[2].startswith(texts[1])):
            return None
        if len(self.counts) != 1 or SHARED in self.counts:
            return None
        text, marks = texts[2], [texts[2].find(marker) for marker in _MARKERS[:6]]
        size = len(_MARKERS[0])
        gaps = [text[end + size : start] for end, start in pairwise(marks)]
        spans = [answer.spans[0] for answer in answers]
        distances = {(m - s.prompt_end, m - s.start) for m, s in zip(marks[1::2], spans, strict=True)}
        closings = {t[m + size : s.end] for t, m, s in zip(texts, marks[1::2], spans, strict=True)}
        if len({*gaps[::2]}) != 1 or len({*gaps[1::2]}) != 1 or len(distances) != 1 or len(closings) != 1:
            return None
        at_end = _after(self.template.render(messages, rendering), _MARKERS[5])
        if at_end is None or -1 in marks:
            return None
        ((prompt_end, start),) = distances
        return _Layout(gaps[0], gaps[1], prompt_end, start, closings.pop(), at_end, next(iter(self.counts)))

    def _between(
        self, messages: Messages, first: str, second: str | None, rendering: Rendering, generation_prompt: bool = False
    ) -> str | None:
        """Render a conversation with markers; the text after marker `first`, up to `second`. None if it has neither."""
        try:
            text = self.template.render(messages, rendering, generation_prompt=generation_prompt)
        except TemplateError:
            return None
        rest = _after(text, first)
        return rest if rest is None or second is None else (rest[: rest.find(second)] if second in rest else None)

    def _check(self, message: Mapping[str, Any], answer: str) -> None:
        """Count what the template leaves out; an answer without its own text is an error."""
        content = str(message["content"])
        if not any(text.strip() in answer for text in (content, _THOUGHT_END.split(content)[-1])):
            raise TemplateError("the chat template does not put the answer after the prompt")
        reasoning = str(message.get("reasoning_content") or "").strip()
        if reasoning not in answer:
            self.counts["answers whose reasoning the template leaves out"] += 1
        calls = message.get("tool_calls") or []
        if not all(call["function"]["name"] in answer for call in calls):
            raise TemplateError("the chat template leaves out the tool calls of an answer")

    def _spelled(self, message: Mapping[str, Any], text: str, start: int) -> list[tuple[int, int]]:
        """Spans of the message's texts texts, where one spells a special token."""
        texts = [str(message.get(key) or "").strip() for key in ("reasoning_content", "content")]
        if any(map(self._structure.search, _strings(message.get("tool_calls")))):
            raise TemplateError("a tool call of an answer spells a special token")
        if not any(map(self._structure.search, texts)):
            return []
        self.counts["answers that spell a special token"] += 1
        spans = []
        for value in filter(None, texts):
            if (position := text.find(value, start)) >= 0:
                spans.append((position, position + len(value)))
                start = position + len(value)
        return spans


def _has_answer(message: Mapping[str, Any]) -> bool:
    return bool(str(message["content"]).strip() or message.get("tool_calls") or message.get("reasoning_content"))


def _after(text: str, marker: str) -> str | None:
    """The text after the last occurrence of a marker."""
    return text.rpartition(marker)[2] if marker in text else None


def _shared(one: str, other: str) -> int:
    """Length of what two texts begin with; a tag, such as `<think>`, is shared whole or not at all."""
    length = _common_length(one, other)
    cut = re.search(r"[<\[][^<>\[\]\s]*$", one[:length])
    return cut.start() if cut else length


def _common_length(one: str, other: str) -> int:
    return next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _strings(value: Any) -> Sequence[str]:
    """All strings in a JSON value."""
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else []
    return [text for item in items for text in _strings(item)]
