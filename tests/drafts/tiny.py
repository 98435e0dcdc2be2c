"""Small worlds for drafts and training: a random target, rows of tokens, and states of those rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import datasets
import torch
from safetensors.torch import save_file

from speculators.config.algorithms import DFlash, Eagle3, Loss, loss_weights
from speculators.drafts.base import Draft, TargetParts, TrainState, Vocabulary
from speculators.drafts.dflash import DFlashDraft
from speculators.drafts.eagle3 import Eagle3Draft
from speculators.features.batch import PackedBatch
from speculators.features.contract import feature_contract
from speculators.features.shards import ShardWriter
from speculators.ops.distillation import TargetHead
from speculators.targets.checkpoint import TargetCheckpoint

H, V, LAYERS = 32, 96, 6
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": H,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": V,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}


def write_target(directory: Path, head: float = 1.0, **changes: object) -> Path:
    """A checkpoint directory with what training reads of a target; `head` is the size of its head's weights."""
    directory.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(1)
    tensors = {
        "model.embed_tokens.weight": torch.randn(V, H, generator=draw),
        "lm_head.weight": head * torch.randn(V, H, generator=draw),
        "model.norm.weight": 1.0 + 0.1 * torch.randn(H, generator=draw),
    }
    save_file({name: t.bfloat16() for name, t in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return directory


def vocabulary(kept: int = 40) -> Vocabulary:
    """`kept` of the V tokens, spread over the whole range."""
    tokens = torch.randperm(V, generator=torch.Generator().manual_seed(2))[:kept].sort().values
    t2d = torch.zeros(V, dtype=torch.bool)
    t2d[tokens] = True
    return Vocabulary(d2t=tokens - torch.arange(kept), t2d=t2d)


def make_parts(directory: Path, kept: int = 40) -> tuple[TargetParts, Vocabulary]:
    """What a draft takes over from the target in `directory`, and its vocabulary."""
    vocab = vocabulary(kept)
    return TargetCheckpoint(directory).parts(vocab.tokens), vocab


def make_teacher(directory: Path, draft: Draft) -> TargetHead:
    """The target in `directory`, for the draft's vocabulary."""
    target = TargetCheckpoint(directory)
    norm, head = target.final_norm(), target.head(draft.vocabulary.tokens).float()
    return TargetHead(norm_weight=norm.weight, norm_eps=norm.eps, head=head)


def make_draft(directory: Path, kept: int = 40, **options: object) -> tuple[Eagle3Draft, TargetHead]:
    """A fresh EAGLE-3 draft for the target in `directory`, and its teacher."""
    parts, vocab = make_parts(directory, kept)
    draft = Eagle3Draft.from_target(parts, Eagle3(**options), vocab, [1, 3, 4], seed=3)
    return draft, make_teacher(directory, draft)


def make_dflash(directory: Path, kept: int = 40, **options: object) -> tuple[DFlashDraft, TargetHead]:
    """A fresh DFlash draft of two layers and blocks of four for the target in `directory`, and its teacher."""
    parts, vocab = make_parts(directory, kept)
    chosen = DFlash(**{"num_layers": 2, "block_size": 4, "mask_token_id": 7, **options})  # type: ignore[arg-type]
    draft = DFlashDraft.from_target(parts, chosen, vocab, [1, 3, 4], seed=3)
    return draft, make_teacher(directory, draft)


def losses_of(draft: Draft) -> dict[Loss, float]:
    """The losses that the draft's options name."""
    return loss_weights(draft.options.loss_fn)


def state_at(step: int, total_steps: int = 100) -> TrainState:
    """Training after `step` steps."""
    return TrainState(step=step, total_steps=total_steps, seed=3)


def make_pack(lengths: list[int], seed: int = 4) -> PackedBatch:
    """Random documents: the first third of each is a prompt, the rest is supervised."""
    draw = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    mask = torch.cat([torch.arange(n) >= max(1, n // 3) for n in lengths])
    token_ids, states = torch.randint(V, (total,), generator=draw), torch.randn(total, 4, H, generator=draw).bfloat16()
    return pack_of(lengths, token_ids, mask, states)


def pack_of(lengths: list[int], token_ids: torch.Tensor, loss_mask: torch.Tensor, states: torch.Tensor) -> PackedBatch:
    """Documents with all states [T, L, H]."""
    return PackedBatch(
        rows=list(range(len(lengths))),
        lengths=lengths,
        token_ids=token_ids,
        loss_mask=loss_mask,
        hidden_states=states[:, :-1],
        last_hidden_states=states[:, -1],
        last_index=torch.arange(len(states)),
    )


def whole(pack: PackedBatch) -> torch.Tensor:
    """All states of a pack that has them everywhere, [T, L, H]."""
    return torch.cat([pack.hidden_states, pack.last_hidden_states[:, None]], 1)


def write_corpus(directory: Path, rows: int = 24) -> tuple[Path, Path]:
    """A token table and its hidden states, as the stages leave them: (tokens, features)."""
    draw = torch.Generator().manual_seed(5)
    contract = feature_contract(
        target="t" * 64,
        tokens="k" * 64,
        dtype="bfloat16",
        compute_dtype="float32",
        layer_ids=[1, 3, 4, 6],
        hidden_size=H,
    )
    writer = ShardWriter(directory / "features", contract, shard_tokens=200)
    table: dict[str, list[object]] = {name: [] for name in ("input_ids", "loss_mask", "seq_len", "id", "source")}
    for row in range(rows):
        pack = make_pack([int(torch.randint(8, 40, (), generator=draw))], seed=100 + row)
        table["input_ids"].append(pack.token_ids.tolist())
        table["loss_mask"].append(pack.loss_mask.long().tolist())
        table["seq_len"].append(pack.lengths[0])
        table["id"].append(f"conversation-{row}")
        table["source"].append("random")
        writer.add(row, pack.token_ids, whole(pack))
    writer.close()
    datasets.Dataset.from_dict(table).save_to_disk(str(directory / "tokens"))
    return directory / "tokens", directory / "features"


def write_vocabulary(directory: Path, kept: int = 40) -> Path:
    """A vocabulary artifact."""
    directory.mkdir(parents=True, exist_ok=True)
    vocab = vocabulary(kept)
    save_file({"d2t": vocab.d2t, "t2d": vocab.t2d}, directory / "vocab.safetensors")
    return directory


def copying_target() -> tuple[TargetParts, Vocabulary]:
    """A target whose embeddings are wide enough to be told from each other, and its whole vocabulary."""
    width = 128
    config = {**CONFIG, "hidden_size": width, "head_dim": 32, "max_position_embeddings": 256}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 100000.0}
    embeddings = 0.1 * torch.randn(V, width, generator=torch.Generator().manual_seed(5))
    parts = TargetParts(
        name="copy",
        architectures=["LlamaForCausalLM"],
        config=config,
        rope_parameters=config["rope_parameters"],
        embeddings=embeddings,
        head=embeddings,
    )
    return parts, Vocabulary(d2t=torch.zeros(V, dtype=torch.int64), t2d=torch.ones(V, dtype=torch.bool))


def repeating_packs(embeddings: torch.Tensor, count: int) -> list[PackedBatch]:
    """Documents that say 30 random tokens twice; the first state tells the token, the second the one before it."""
    draw = torch.Generator().manual_seed(6)
    packs = []
    for row in range(count):
        tokens = torch.randint(len(embeddings), (30,), generator=draw).repeat(2)
        states = 0.1 * torch.randn(60, 4, embeddings.shape[1], generator=draw)
        states[:, 0] = embeddings[tokens] + 0.3 * states[:, 0]
        states[1:, 1] = embeddings[tokens[:-1]] + 0.3 * states[1:, 1]
        mask = torch.arange(60) >= 32
        packs.append(replace(pack_of([60], tokens, mask, states.bfloat16()), rows=[row]))
    return packs


def copied(draft: Draft, packs: list[PackedBatch]) -> float:
    """Of the first proposals in such documents, the share that says what comes next."""
    right = total = 0
    for pack in packs:
        predictions = draft(pack)
        target = predictions.target_index[0]
        said = (predictions.hidden_states[0] @ draft.lm_head.weight.T).argmax(-1)
        asked = predictions.valid[0] & (target + 1 < len(pack.token_ids))
        right += int((said == pack.token_ids.roll(-1)[target])[asked].sum())
        total += int(asked.sum())
    return right / total
