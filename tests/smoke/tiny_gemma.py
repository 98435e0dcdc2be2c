"""A tiny Gemma 4 of random weights, which no hub has to be asked for. Its tokens are bytes."""

from __future__ import annotations

from pathlib import Path

import torch

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "<bos>{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write(directory: Path) -> None:
    """A checkpoint of eight layers, windowed and whole ones in turn, with a capped head."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig, PreTrainedTokenizerFast

    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges=[], unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>",
        mask_token="<mask>", additional_special_tokens=list(SPECIAL[5:]), chat_template=TEMPLATE,
    )  # fmt: skip
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    Gemma4ForCausalLM(
        Gemma4TextConfig(
            vocab_size=len(names), vocab_size_per_layer_input=len(names), hidden_size=128,
            hidden_size_per_layer_input=0, intermediate_size=256, num_hidden_layers=8, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, global_head_dim=32, max_position_embeddings=1024, sliding_window=64,
            layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 2, final_logit_softcapping=30.0,
            bos_token_id=2, eos_token_id=1, pad_token_id=0,
        )
    ).save_pretrained(directory)  # fmt: skip
