"""A table of what real chat templates do: small templates, and conversations whose answers are marked by hand.

Between « and » stands what is supervised; the text before is the prompt as a server renders it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from speculators.data.answer_text import DIFFERENCE, OWN_MASK, SHARED, AnswerFinder
from speculators.data.chat_template import Rendering, TemplateError, load_chat_template
from speculators.data.template import AnswerTokenizer, TokenSequence
from speculators.errors import SourceError
from tests.data import chat
from tests.data.chat import CHATML, char_tokenizer, llama_tokenizer, save

IM = ["<|im_start|>", "<|im_end|>"]
THINK = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
CHATML_TOKENS: dict[str, Any] = {"special": IM, "eos": "<|im_end|>"}
QWEN_TOKENS: dict[str, Any] = {**CHATML_TOKENS, "plain": THINK}
GEMMA_TOKENS = {"special": ["<bos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>"], "eos": "<turn|>"}
CLOSED_TOKENS = {"special": ["<A>", "<U>", "<eos>"], "plain": THINK, "eos": "<eos>"}
GLM_SPECIAL = ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"]
GLM_TOKENS = {"special": GLM_SPECIAL, "plain": THINK, "eos": "<|endoftext|>"}
PHI_TOKENS = {"special": ["<|end|>", "<|endoftext|>", "<|user|>", "<|assistant|>"], "eos": "<|endoftext|>"}
COHERE_SPECIAL = ["<BOS>", "<START>", "<CHATBOT>", "<RESPONSE>", "<END_RESPONSE>", "<END>", "<USER>"]
HARMONY_SPECIAL = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "be"}
TALK = [user("a b"), assistant("Hello"), user("c"), assistant("d e")]
THOUGHT = [user("a b"), assistant("Hello", reasoning_content="hm"), user("c"), assistant("d e", reasoning_content="so")]
CALL = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
CALLED = [user("a"), assistant("", tool_calls=CALL), {"role": "tool", "content": "7"}, assistant("x")]
NO_THOUGHTS = {"enable_thinking": False}

HI = "<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\n"
BYE = "<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
ASKED = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
A_CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
A_RESULT = "<|im_end|>\n<|im_start|>user\n<tool_response>7</tool_response><|im_end|>\n<|im_start|>assistant\n"
EMPTY = "<think>\n\n</think>\n\n"
GEMMA = "<bos><|turn>user\na b<turn|>\n<|turn>model\n"
GEMMA_LATER = "Hello<turn|>\n<|turn>user\nc<turn|>\n<|turn>model\n"
CHANNEL = "<|channel>thought\n<channel|>"
GLM = "[gMASK]<sop><|user|>\na"
CHATML_ROW = f"{HI}«Hello<|im_end|>»{BYE.removeprefix('<|im_end|>')}«d e<|im_end|>»"

TRAITS = {
    "plain": (CHATML, CHATML_TOKENS, TALK, {}, [CHATML_ROW]),
    "system prompt": (
        CHATML,
        CHATML_TOKENS,
        [SYSTEM, *TALK],
        {},
        [f"<|im_start|>system\nbe<|im_end|>\n{CHATML_ROW}"],
    ),
    "an answer before the first question is context": (
        CHATML,
        CHATML_TOKENS,
        [assistant("hey"), *TALK],
        {},
        [f"<|im_start|>assistant\nhey<|im_end|>\n{CHATML_ROW}"],
    ),
    "end token not flagged as special": (CHATML, {"special": IM[:1], "plain": IM[1:]}, TALK, {}, [CHATML_ROW]),
    "empty thought in the prompt": (
        chat.EMPTY_THOUGHT_IN_PROMPT,
        GEMMA_TOKENS,
        TALK,
        {},
        [f"{GEMMA}{CHANNEL}«Hello<turn|>»", f"{GEMMA}{GEMMA_LATER}{CHANNEL}«d e<turn|>»"],
    ),
    "no thought in the prompt by an option": (
        chat.EMPTY_THOUGHT_IN_PROMPT,
        GEMMA_TOKENS,
        TALK,
        {"enable_thinking": True},
        [f"{GEMMA}«Hello<turn|>»\n<|turn>user\nc<turn|>\n<|turn>model\n«d e<turn|>»"],
    ),
    "opened thought in the prompt": (
        chat.OPENED_THOUGHT,
        QWEN_TOKENS,
        TALK,
        {},
        [f"{HI}<think>\n«Hello<|im_end|>»", f"{HI}Hello{BYE}<think>\n«d e<|im_end|>»"],
    ),
    "scaffold that depends on an option": (
        chat.THOUGHT_BY_OPTION,
        QWEN_TOKENS,
        TALK,
        NO_THOUGHTS,
        [f"{HI}{EMPTY}«Hello<|im_end|>»", f"{HI}Hello{BYE}{EMPTY}«d e<|im_end|>»"],
    ),
    "reasoning after a prompt that closes the thought": (
        chat.THOUGHT_BY_OPTION,
        QWEN_TOKENS,
        THOUGHT,
        NO_THOUGHTS,
        [f"{HI}{EMPTY}«Hello<|im_end|>»", f"{HI}Hello{BYE}{EMPTY}«d e<|im_end|>»"],
    ),
    "a thought in the text after a prompt that closes it": (
        chat.THOUGHT_BY_OPTION,
        QWEN_TOKENS,
        [user("a b"), assistant("<think>hm</think>\n\nHello")],
        NO_THOUGHTS,
        [f"{HI}{EMPTY}«Hello<|im_end|>»"],
    ),
    "an option within the prompt's header": (
        chat.OPTION_IN_HEADER,
        CHATML_TOKENS,
        TALK,
        {"length": "short"},
        [
            f"{HI[:-1]} short\n«Hello<|im_end|>»",
            f"{HI}Hello{BYE[:-1]} short\n«d e<|im_end|>»",
        ],
    ),
    "scaffold that nobody said": (
        chat.THOUGHT_BY_OPTION,
        QWEN_TOKENS,
        TALK,
        {},
        [f"{HI}{EMPTY}«Hello<|im_end|>»", f"{HI}Hello{BYE}{EMPTY}«d e<|im_end|>»"],
    ),
    "reasoning": (
        chat.THOUGHT_BY_OPTION,
        QWEN_TOKENS,
        THOUGHT,
        {},
        [
            f"{HI}«<think>\nhm\n</think>\n\nHello<|im_end|>»",
            f"{HI}Hello{BYE}«<think>\nso\n</think>\n\nd e<|im_end|>»",
        ],
    ),
    "tool calls": (
        chat.THOUGHT_BY_OPTION,
        QWEN_TOKENS,
        CALLED,
        {},
        [f"{ASKED}{EMPTY}«{A_CALL}<|im_end|>»", f"{ASKED}{A_CALL}{A_RESULT}{EMPTY}«x<|im_end|>»"],
    ),
    "opened thought, reasoning": (
        chat.OPENED_THOUGHT_BY_OPTION,
        QWEN_TOKENS,
        THOUGHT[:2],
        {},
        [f"{HI}<think>\n«hm\n</think>\n\nHello<|im_end|>»"],
    ),
    "opened thought that the template closes": (
        chat.OPENED_THOUGHT_BY_OPTION,
        QWEN_TOKENS,
        TALK[:2],
        {},
        [f"{HI}{EMPTY}«Hello<|im_end|>»"],
    ),
    "reasoning inside of the content": (
        chat.THOUGHT_IN_CONTENT,
        QWEN_TOKENS,
        [user("a b"), assistant("<think>hm</think>Hello")],
        {},
        [f"{HI}«<think>\nhm\n</think>\n\nHello<|im_end|>»"],
    ),
    "the answer begins with a line break": (
        chat.ROLE_LINES.replace("'<|assistant|>\n'", "'<|assistant|>'"),
        {"special": ["</s>"], "eos": "</s>"},
        TALK[:2],
        {},
        ["<|user|>\na b</s>\n<|assistant|>«\nHello</s>»"],
    ),
    "closed thought in the prompt": (
        chat.CLOSED_THOUGHT,
        CLOSED_TOKENS,
        TALK,
        {},
        ["<U>a b<A></think>«Hello<eos>»<U>c<A></think>«d e<eos>»"],
    ),
    "thought that an option opens and history closes": (
        chat.CLOSED_THOUGHT,
        CLOSED_TOKENS,
        TALK,
        {"thinking": True},
        ["<U>a b<A><think></think>«Hello<eos>»", "<U>a b<A></think>Hello<eos><U>c<A><think></think>«d e<eos>»"],
    ),
    "end-of-text token after the last answer": (
        chat.END_OF_TEXT,
        PHI_TOKENS,
        TALK,
        {},
        ["<|user|>\na b<|end|>\n<|assistant|>\n«Hello<|end|>»\n<|user|>\nc<|end|>\n<|assistant|>\n«d e<|end|>»"],
    ),
    "always a prompt at the end": (
        chat.ALWAYS_A_PROMPT,
        {"special": COHERE_SPECIAL, "eos": "<END>"},
        TALK,
        {},
        [
            "<BOS><START><USER>a b<END><START><CHATBOT>«<RESPONSE>Hello<END_RESPONSE><END>»"
            "<START><USER>c<END><START><CHATBOT>«<RESPONSE>d e<END_RESPONSE><END>»"
        ],
    ),
    "system prompt that moves with the last question": (
        chat.MOVING_SYSTEM,
        {"special": ["<s>", "</s>", "[INST]", "[/INST]"], "eos": "</s>"},
        [SYSTEM, *TALK],
        {},
        ["<s>[INST]be\n\na b[/INST]«Hello</s>»", "<s>[INST]a b[/INST]Hello</s>[INST]be\n\nc[/INST]«d e</s>»"],
    ),
    "the next role is the end token": (
        chat.NO_END,
        GLM_TOKENS,
        [user("a"), assistant("Hello"), user("c"), assistant("d")],
        {},
        [
            f"{GLM}<|assistant|>\n<think></think>«\nHello<|user|>»\nc<|assistant|>\n<think></think>«\nd<|user|>»",
        ],
    ),
    "the next role after a tool call": (
        chat.NO_END,
        GLM_TOKENS,
        CALLED,
        NO_THOUGHTS,
        [
            f"{GLM}<|assistant|>\n<think></think>«\n<tool_call>f\n1</tool_call><|observation|>»"
            "\n7<|assistant|>\n<think></think>«\nx<|user|>»",
        ],
    ),
    "history that ends differently": (
        chat.CHANNELS,
        {"special": HARMONY_SPECIAL, "eos": "<|return|>"},
        TALK,
        {},
        [
            "<|start|>user<|message|>a b<|end|><|start|>assistant«<|channel|>final<|message|>Hello<|return|>»",
            "<|start|>user<|message|>a b<|end|><|start|>assistant<|channel|>final<|message|>Hello<|end|>"
            "<|start|>user<|message|>c<|end|><|start|>assistant«<|channel|>final<|message|>d e<|return|>»",
        ],
    ),
    "reasoning under another name": (
        chat.CHANNELS,
        {"special": HARMONY_SPECIAL, "eos": "<|return|>"},
        THOUGHT[:2],
        {},
        [
            "<|start|>user<|message|>a b<|end|><|start|>assistant«<|channel|>analysis<|message|>hm<|end|>"
            "<|start|>assistant<|channel|>final<|message|>Hello<|return|>»"
        ],
    ),
    "the template's own mask": (
        chat.OWN_MASK,
        CHATML_TOKENS,
        TALK[:2],
        {},
        [f"{HI}/plain «Hello<|im_end|>»"],
    ),
    "no tokens in the template": (
        chat.NO_TOKENS,
        {"special": ["</s>"], "eos": "</s>"},
        TALK,
        {},
        ["USER: a b\nASSISTANT:« Hello</s>»", "USER: a b\nASSISTANT: Hello\nUSER: c\nASSISTANT:« d e</s>»"],
    ),
    "content that spells special tokens": (
        CHATML,
        CHATML_TOKENS,
        [user("<|im_end|>"), assistant("say <|im_end|> now"), user("c"), assistant("d")],
        {},
        [
            "<|im_start|>user\n<|im_end|><|im_end|>\n<|im_start|>assistant\n«say <|im_end|> now<|im_end|>»",
            "<|im_start|>user\n<|im_end|><|im_end|>\n<|im_start|>assistant\nsay <|im_end|> now"
            "<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n«d<|im_end|>»",
        ],
    ),
}


def tokenized(
    tokenizer: Any, directory: Path, messages: Sequence[dict[str, Any]], kwargs: dict[str, Any]
) -> tuple[list[TokenSequence], AnswerFinder]:
    """The rows of a conversation, and what found its answers."""
    template = load_chat_template(tokenizer, directory)
    finder = AnswerFinder(template)
    texts = finder.texts(messages, Rendering(kwargs=kwargs))
    return AnswerTokenizer(tokenizer.backend_tokenizer.to_str(), template).rows([texts])[0], finder


def marked(tokenizer: Any, row: TokenSequence) -> str:
    """The tokens of a row, as text, with marks where the loss mask changes."""
    text, before = "", 0
    for token, mask in zip(row.input_ids, row.loss_mask, strict=True):
        text += ("«" if mask else "»") * (mask != before) + tokenizer.convert_ids_to_tokens(token)
        before = mask
    return text + "»" * before


@pytest.mark.parametrize("trait", TRAITS)
def test_masks_of_a_template_s_trait_are_those_marked_by_hand(trait: str, tmp_path: Path) -> None:
    template, tokens, messages, kwargs, expected = TRAITS[trait]
    tokenizer = char_tokenizer(template, **tokens)
    rows, _ = tokenized(tokenizer, tmp_path, messages, kwargs)
    assert [marked(tokenizer, row) for row in rows] == expected


@pytest.mark.parametrize("trait", TRAITS)
def test_masks_begin_with_the_prompt_of_a_server(trait: str, tmp_path: Path) -> None:
    template, tokens, messages, kwargs, _ = TRAITS[trait]
    tokenizer = char_tokenizer(template, **tokens)
    rows, _ = tokenized(tokenizer, tmp_path, messages, kwargs)
    first = next(i for i, m in enumerate(messages) if m["role"] == "user")
    for i in (i for i, m in enumerate(messages) if m["role"] == "assistant" and i > first):
        prompt = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True, return_dict=False, **kwargs)
        assert any(row.input_ids[: len(prompt)] == prompt and 1 in row.loss_mask[len(prompt) :] for row in rows), prompt


LLAMA = {
    "spaces": (chat.SPACES, ["<s>", "</s>"], ["<s>_[INST]_a_b_[/INST]«_Hello_</s>»<s>_[INST]_c_[/INST]«_d_e_</s>»"]),
    "line break before the answer": (
        chat.ROLE_LINES,
        ["</s>"],
        ["_<|user|>\na_b</s>_\n<|assistant|>\n«Hello</s>»_\n<|user|>\nc</s>_\n<|assistant|>\n«d_e</s>»"],
    ),
    "no tokens": (
        chat.NO_TOKENS,
        ["</s>"],
        ["_USER:_a_b\nASSISTANT:«_Hello</s>»", "_USER:_a_b\nASSISTANT:_Hello\nUSER:_c\nASSISTANT:«_d_e</s>»"],
    ),
}


@pytest.mark.parametrize("trait", LLAMA)
def test_masks_with_a_tokenizer_that_puts_a_space_before_each_text(trait: str, tmp_path: Path) -> None:
    template, special, expected = LLAMA[trait]
    tokenizer = llama_tokenizer(template, special, eos="</s>")
    rows, _ = tokenized(tokenizer, tmp_path, TALK, {})
    assert [marked(tokenizer, row).replace(chat.SPACE, "_") for row in rows] == expected


@pytest.mark.parametrize("scheme", ["", "always", "first", "never"])
@pytest.mark.parametrize("strips", ["|", "-"])
def test_answers_have_the_tokens_of_their_text_after_the_prompt_of_a_server(
    scheme: str, strips: str, tmp_path: Path
) -> None:
    tokenizer = llama_tokenizer(chat.END_OF_TEXT, PHI_TOKENS["special"], (), "<|endoftext|>", scheme, strips)
    (row,), _ = tokenized(tokenizer, tmp_path, TALK, {})
    text = "<|user|>\na b<|end|>\n<|assistant|>\nHello<|end|>\n<|user|>\nc<|end|>\n<|assistant|>\nd e<|end|>"
    assert row.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    for question in (TALK[:1], TALK[:3]):
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
        assert row.input_ids[: len(prompt)] == prompt
        assert row.loss_mask[len(prompt) - 1 : len(prompt) + 1] == [0, 1]


def test_a_spelled_special_token_is_characters_in_an_answer_and_a_token_in_a_prompt(tmp_path: Path) -> None:
    tokenizer = char_tokenizer(CHATML, **CHATML_TOKENS)
    messages = [user("<|im_end|>"), assistant("say <|im_end|> now")]
    (row,), finder = tokenized(tokenizer, tmp_path, messages, {})
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [mask for token, mask in zip(row.input_ids, row.loss_mask, strict=True) if token == end] == [0, 0, 1]
    assert finder.counts["answers that spell a special token"] == 1


def test_masks_count_the_methods_that_found_them(tmp_path: Path) -> None:
    for trait, method in (("plain", DIFFERENCE), ("the template's own mask", OWN_MASK)):
        template, tokens, messages, kwargs, _ = TRAITS[trait]
        _, finder = tokenized(char_tokenizer(template, **tokens), tmp_path, messages, kwargs)
        assert finder.counts == {method: len(messages) // 2}
    template, tokens, messages, kwargs, _ = TRAITS["opened thought in the prompt"]
    _, finder = tokenized(char_tokenizer(template, **tokens), tmp_path, messages, kwargs)
    assert finder.counts == {SHARED: 2, "answers without reasoning after a prompt that opens a thought": 2}


def test_the_end_token_of_generation_config_counts_before_the_template_s_own(tmp_path: Path) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<a><b><c>{% endfor %}<assistant>"
    tokenizer = char_tokenizer(template, ["<a>", "<b>", "<c>", "<user>", "<assistant>"])
    save(tokenizer, tmp_path, ["<b>"])
    (row,), _ = tokenized(tokenizer, tmp_path, TALK[:2], {})
    assert marked(tokenizer, row) == "<user>a b<a><b><c><assistant>«Hello<a><b>»"


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        ("{{ raise_exception('no system role') }}", TALK, "no system role"),
        ("{{ messages[0].content + 1 }}", TALK, "TypeError"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", TALK, "does not put the answer after the prompt"),
        (chat.OPENED_THOUGHT, THOUGHT, "leaves out the reasoning"),
        (chat.OPENED_THOUGHT, [user("a"), assistant("<think>hm</think>Hello")], "leaves out the reasoning"),
        (CHATML, CALLED, "leaves out the tool calls"),
    ],
)
def test_a_conversation_without_an_exact_mask_is_refused_with_the_reason(
    template: str, messages: list[dict[str, Any]], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(TemplateError, match=reason):
        tokenized(char_tokenizer(template, **QWEN_TOKENS), tmp_path, messages, {})


def test_the_number_of_renderings_does_not_grow_with_the_conversation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = load_chat_template(char_tokenizer(CHATML, **CHATML_TOKENS), tmp_path)
    finder = AnswerFinder(template)
    finder.texts(TALK, Rendering())
    rendered, render = [], type(template).render

    def counted(*arguments: Any, **options: Any) -> str:
        rendered.append(arguments)
        return render(*arguments, **options)

    monkeypatch.setattr(type(template), "render", counted)
    (text,) = finder.texts(TALK * 40, Rendering())
    assert len(text.spans) == 80
    assert len(rendered) == 2


def test_a_target_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no chat template"):
        load_chat_template(char_tokenizer("", IM), tmp_path)
