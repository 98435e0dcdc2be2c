"""Small tokenizers and chat templates, one for each trait that real templates have; the words are our own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
SPACE = "\u2581"


def char_tokenizer(template: str, special: Sequence[str], plain: Sequence[str] = (), eos: str = "") -> Any:
    """One token a character, and added tokens, of which `plain` are not flagged as special."""
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(CHARACTERS)} | {"\u00bf": 99}, unk_token="\u00bf"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return _finished(inner, template, special, plain, eos)


def llama_tokenizer(
    template: str, special: Sequence[str], plain: Sequence[str] = (), eos: str = "", scheme: str = "", strips: str = "-"
) -> Any:
    """As Llama 2's: a space is put before every piece of text, and a word begins with its space. With a `scheme`, by
    Metaspace instead of a normalizer; special tokens with `strips` in them take the spaces after them."""
    vocabulary = [*CHARACTERS.replace(" ", ""), SPACE, *(f"{SPACE}{c}" for c in "abcdefghxyABH")]
    merges = [(SPACE, c) for c in "abcdefghxyABH"]
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(vocabulary)}, merges, unk_token="~"))
    if scheme:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    else:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    inner.add_special_tokens([AddedToken(t, normalized=False, rstrip=True) for t in special if strips in t])
    return _finished(inner, template, special, plain, eos)


def _finished(inner: Tokenizer, template: str, special: Sequence[str], plain: Sequence[str], eos: str) -> Any:
    inner.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    inner.add_tokens([AddedToken(token, normalized=False) for token in plain])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **({"eos_token": eos} if eos else {}))
    tokenizer.chat_template = template
    return tokenizer


def save(tokenizer: Any, directory: Path, ends: Sequence[str] = ()) -> Path:
    """Write a target's directory; generation stops at `ends`."""
    tokenizer.save_pretrained(directory)
    if ends:
        ids = [tokenizer.convert_tokens_to_ids(end) for end in ends]
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return directory


CHATML = """{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""

OPTION_IN_HEADER = CHATML.replace("assistant\n", "assistant' + (' ' + length if length else '') + '\n")

EMPTY_THOUGHT_IN_PROMPT = """{{- '<bos>' -}}
{%- for m in messages -%}
{{ '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<turn|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|turn>model\n' }}{%- if not enable_thinking | default(false) -%}{{ '<|channel>thought\n<channel|>' }}{%- endif -%}
{%- endif -%}"""

OPENED_THOUGHT = """{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{ '<|im_start|>assistant\n' + m.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}
{%- else -%}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n<think>\n' }}{%- endif -%}"""

THOUGHT_BY_OPTION = """{%- set ns = namespace(last=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- if tools -%}{{ '<|im_start|>system\ntools: ' + tools | tojson + '<|im_end|>\n' }}{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{ '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last and (loop.last or m.reasoning_content) -%}
{{ '<think>\n' + (m.reasoning_content or '') | trim('\n') + '\n</think>\n\n' }}
{%- endif -%}
{{ m.content }}
{%- for call in m.tool_calls or [] -%}
{{ '<tool_call>\n' + call.function | tojson + '\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\n' }}
{%- elif m.role == 'tool' -%}{{ '<|im_start|>user\n<tool_response>' + m.content + '</tool_response><|im_end|>\n' }}
{%- else -%}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}
{%- endif -%}"""

OPENED_THOUGHT_BY_OPTION = THOUGHT_BY_OPTION.replace(
    "{%- endif -%}\n{%- endif -%}", "{%- else -%}{{ '<think>\n' }}{%- endif -%}\n{%- endif -%}"
)

THOUGHT_IN_CONTENT = """{%- for m in messages -%}
{%- if m.role == 'assistant' and '</think>' in m.content -%}
{%- set thought = m.content.split('</think>')[0].split('<think>')[-1] -%}
{{ '<|im_start|>assistant\n<think>\n' + thought + '\n</think>\n\n' + m.content.split('</think>')[-1] + '<|im_end|>\n' }}
{%- else -%}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""

CLOSED_THOUGHT = """{%- for m in messages -%}
{%- if m.role == 'assistant' -%}{{ '<A></think>' + m.content + '<eos>' }}
{%- else -%}{{ '<U>' + m.content }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<A>' + ('<think>' if thinking else '</think>') }}{%- endif -%}"""

END_OF_TEXT = """{%- for m in messages -%}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- else -%}{{ '<|endoftext|>' }}{%- endif -%}"""

ALWAYS_A_PROMPT = """{{- '<BOS>' -}}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}{{ '<START><CHATBOT><RESPONSE>' + m.content + '<END_RESPONSE><END>' }}
{%- else -%}{{ '<START><' + m.role | upper + '>' + m.content + '<END>' }}{%- endif -%}
{%- endfor -%}{{ '<START><CHATBOT>' }}"""

MOVING_SYSTEM = """{%- set ns = namespace(system='') -%}{{- '<s>' -}}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{%- set ns.system = m.content -%}
{%- elif m.role == 'user' -%}
{{ '[INST]' + (ns.system + '\n\n' if loop.last and ns.system else '') + m.content + '[/INST]' }}
{%- else -%}{{ m.content + '</s>' }}{%- endif -%}
{%- endfor -%}"""

SPACES = """{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ '<s>[INST] ' + m.content + ' [/INST]' }}
{%- else -%}{{ ' ' + m.content | trim + ' </s>' }}{%- endif -%}
{%- endfor -%}"""

ROLE_LINES = """{%- for m in messages -%}{{ '<|' + m.role + '|>\n' + m.content + '</s>\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- endif -%}"""

NO_END = """{{- '[gMASK]<sop>' -}}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{ '<|assistant|>\n<think>' + (m.reasoning_content or '') + '</think>\n' + m.content | trim }}
{%- for call in m.tool_calls or [] -%}
{{ '<tool_call>' + call.function.name + '\n' + call.function.arguments.x ~ '</tool_call>' }}
{%- endfor -%}
{%- elif m.role == 'tool' -%}{{ '<|observation|>\n' + m.content }}
{%- else -%}{{ '<|' + m.role + '|>\n' + m.content }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}
{%- if enable_thinking is defined and not enable_thinking -%}{{ '\n<think></think>' }}{%- endif -%}{%- endif -%}"""

CHANNELS = """{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- if m.thinking and loop.last -%}
{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif -%}
{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}
{%- else -%}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start|>assistant' }}{%- endif -%}"""

OWN_MASK = """{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{ '<|im_start|>assistant\n/plain ' }}{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}
{%- else -%}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""

NO_TOKENS = """{%- for m in messages -%}{{ m.role | upper + ': ' + m.content + '\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"""
