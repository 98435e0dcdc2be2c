"""Reads a target's checkpoint directory, in the Hugging Face layout, tensor by tensor.

A draft needs four things of its target: the text config, the embeddings, the final norm and the head. They are read
from the safetensors files by name; the model itself, which may be a hundred times larger, is never built.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from speculators.checkpoint_files import (
    EMBEDDINGS,
    FINAL_NORM,
    HEAD,
    PREFIXES,
    common_names,
    find_tensor,
    layer_norm,
    stated_tying,
)
from speculators.drafts.base import TargetParts
from speculators.errors import ContractError, SourceError
from speculators.tokenizer_files import mask_token

UNIT_OFFSET_NORMS = frozenset(
    (
        *("gemma", "gemma2", "gemma3", "gemma3_text", "recurrent_gemma", "vaultgemma"),
        *("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
        *("step3p7", "step3p7_text", "minimax_m3_vl", "minimax_m3_vl_text"),
    )
)
"""Model types whose RMSNorm multiplies by 1 + weight, so that a stored zero means one."""

MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
"""Config fields that logits are multiplied by: Cohere's, Falcon-H1's, Muse's."""
MULTIPLIED_BY_LOGITS_SCALING = ("hyperclovax",)
"""Prefixes of the model types that multiply by `logits_scaling`; Granite, and all others that have it, divide."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinalNorm:
    """The RMSNorm between the last layer and the head; `weight` [H] float32 is the factor, offset included."""

    weight: Tensor
    eps: float
    unit_offset: bool = False
    """The checkpoint stores the factor minus 1."""


class TargetCheckpoint:
    """The parts of a checkpoint directory that training reads.

    Raises:
        SourceError: there is no such directory, no config.json or no safetensors file.
        ContractError: a tensor that every target has is missing or has another shape.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.raw: dict[str, Any] = _read_json(directory / "config.json")
        self.config: Mapping[str, Any] = common_names(_text_config(directory))
        self._files = _index(directory)
        self.architectures: list[str] = list(self.raw.get("architectures") or [])
        self.hidden_size = int(self.config["hidden_size"])
        """Width H of the residual stream."""
        self.vocab_size = int(self.config["vocab_size"])
        """Number V of rows of the embeddings and of the head."""

    @property
    def logit_scale(self) -> float:
        """The factor of the head's output: the product of all config fields that name one."""
        scale = float(self.config.get("logits_scaling") or 1.0)
        if not str(self.config["model_type"]).startswith(MULTIPLIED_BY_LOGITS_SCALING):
            scale = 1.0 / scale
        return math.prod((float(self.config.get(name) or 1.0) for name in MULTIPLIERS), start=scale)

    @property
    def logit_softcap(self) -> float | None:
        """c in c * tanh(logits / c), for targets that bound their logits (Gemma)."""
        cap = self.config.get("final_logit_softcapping")
        return float(cap) if cap else None

    @property
    def bytes(self) -> int:
        """Size of the weights on disk."""
        return sum(path.stat().st_size for path in set(self._files.values()))

    @property
    def tied(self) -> bool:
        """Whether the head is the embeddings.

        config.json counts before transformers' default, and in it the text config before the multimodal one. Where
        neither has the field and the files hold no head, the head is tied.
        """
        stated = stated_tying(self.raw)
        if stated is not None:
            return stated
        return bool(self.config.get("tie_word_embeddings", False)) or not self._has(HEAD)

    @property
    def has_head(self) -> bool:
        """Whether the head that `tied` names exists; without it `head` raises."""
        return self.tied or self._has(HEAD)

    def other_head(self) -> Tensor | None:
        """The head [V, H] if `tied` is wrong: the head's own tensor or the embeddings; None if there is no other."""
        if self.tied and not self._has(HEAD):
            return None
        return self._matrix(self._find(HEAD, "output head")) if self.tied else self.embeddings()

    def embeddings(self) -> Tensor:
        """Input embeddings [V, H] in the stored dtype."""
        return self._matrix(self._find(EMBEDDINGS, "input embeddings"))

    def head(self, rows: Tensor | None = None) -> Tensor:
        """Output head [V, H], or its `rows` (int64), in the stored dtype; the embeddings where the two are tied."""
        name = self._find(EMBEDDINGS, "input embeddings") if self.tied else self._find(HEAD, "output head")
        head = self._matrix(name)
        return head if rows is None else head.index_select(0, rows)

    def parts(self, rows: Tensor | None = None, name: str = "") -> TargetParts:
        """What a draft takes over from its target; of the head only `rows` (int64), if given.

        `name` is what other programs load the target by, such as its hub id; empty: this directory.
        """
        return TargetParts(
            name=name or str(self.directory.absolute()),
            architectures=self.architectures,
            config=self.config,
            rope_parameters=rope_parameters(self.config),
            embeddings=self.embeddings(),
            head=self.head(rows),
        )

    def final_norm(self) -> FinalNorm:
        """The norm between the last layer and the head; a ContractError if it is not an RMSNorm."""
        name = self._find(FINAL_NORM, "final norm")
        if why := layer_norm(str(self.config["model_type"]), name, self._files):
            raise ContractError(
                f"the final norm of {self.directory} {why}: it is a LayerNorm, and only RMSNorm is supported",
                "train for a target whose final norm is an RMSNorm",
            )
        weight = self._read(name).float()
        if list(weight.shape) != [self.hidden_size]:
            raise ContractError(f"{name} is {list(weight.shape)}, not [{self.hidden_size}]", "check the checkpoint")
        offset = self.config["model_type"] in UNIT_OFFSET_NORMS
        eps = self.config.get("rms_norm_eps") or 1e-6
        return FinalNorm(weight=weight + float(offset), eps=float(eps), unit_offset=offset)

    def mask_token_id(self) -> int:
        """The token that stands for the positions of a block that a draft has yet to fill in; see `mask_token`.

        Raises:
            ContractError: the tokenizer has no such token.
        """
        if (known := mask_token(self.directory, self.vocab_size)) is not None:
            return known.id
        from transformers import AutoTokenizer  # it reads the formats without a tokenizer.json

        tokenizer = AutoTokenizer.from_pretrained(str(self.directory), local_files_only=True)
        unused = len(tokenizer) if len(tokenizer) < self.vocab_size else None
        for token in (tokenizer.mask_token_id, unused, tokenizer.pad_token_id, tokenizer.eos_token_id):
            if token is not None and token < self.vocab_size:  # a tokenizer may have more tokens than embeddings
                return int(token)
        raise ContractError(
            f"the tokenizer of {self.directory} has no token for masks, padding or the end",
            "set speculator.mask_token_id to a token that answers do not use",
        )

    def _has(self, names: Collection[str]) -> bool:
        return find_tensor(self._files, names) is not None

    def _find(self, names: Collection[str], what: str) -> str:
        if name := find_tensor(self._files, names):
            return name
        tried = [prefix + name for name in names for prefix in PREFIXES]
        raise ContractError(
            f"{self.directory} has no {what}: its safetensors files have none of {', '.join(tried[:3])}, ...",
            "the target has to be a complete decoder checkpoint in the Hugging Face layout",
        )

    def _matrix(self, name: str) -> Tensor:
        matrix = self._read(name)
        if list(matrix.shape) != [self.vocab_size, self.hidden_size]:
            raise ContractError(
                f"{name} has the shape {list(matrix.shape)}, config.json says [{self.vocab_size}, {self.hidden_size}]",
                "check that config.json and the weights are of one model",
            )
        return matrix

    def _read(self, name: str) -> Tensor:
        with safe_open(self._files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def _text_config(directory: Path) -> dict[str, Any]:
    """The text part of config.json, with transformers' defaults for what the file leaves out."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(
            f"transformers cannot read {directory}/config.json: {str(error).splitlines()[0]}",
            "check its model_type; a newer transformers may know it",
        ) from None
    text_config: dict[str, Any] = config.get_text_config().to_dict()
    return text_config


def _index(directory: Path) -> dict[str, Path]:
    """Map each tensor's name to its file, from the sharded checkpoint's index or from the files themselves."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        return {name: directory / file for name, file in _read_json(index)["weight_map"].items()}
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise SourceError(f"{directory} holds no safetensors file", "give a checkpoint with weights in safetensors")
    tensor_files: dict[str, Path] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            tensor_files.update(dict.fromkeys(file.keys(), path))
    return tensor_files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        hint = "give a checkpoint directory in the Hugging Face layout"
        raise SourceError(f"{path.parent} has no {path.name}", hint) from None
    except ValueError as error:
        raise SourceError(f"{path} is not JSON: {error}", "fetch the target again") from None
    return content


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding of a draft: `rope_type`, `rope_theta` and the other parameters of that type.

    Of targets that rotate only a part of each head, or by several axes, only the frequency base is used: a draft
    rotates whole heads by the token's position, and both trainer and server read that from the draft's own config.
    """
    rope: Mapping[str, Any] = config.get("rope_parameters") or {}
    if any(isinstance(value, Mapping) for value in rope.values()):
        rope = rope.get("full_attention") or next(iter(rope.values()))
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    kind = rope.get("rope_type", "default")
    if kind in ("default", "proportional") or "mrope_section" in rope:
        return {"rope_type": "default", "rope_theta": float(theta)}
    parameters = {name: value for name, value in rope.items() if name != "partial_rotary_factor"}
    return {**parameters, "rope_theta": float(theta)}
