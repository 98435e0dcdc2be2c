"""What a server would accept, foreseen without one, beside what vLLM counted on the same prompts.

    python tests/benchmarks/acceptance.py EVALUATION TARGET DRAFT [LAYER_ID ...]

EVALUATION is the data of an `evaluate` artifact, TARGET a checkpoint of its target, DRAFT the draft that was served or
another one for the same target. The answers of the plain server are run through the target by transformers, in
float32; the draft predicts from every place of them, and the proposals that a server would make are walked
(`acceptance.AcceptanceCounts`). With the draft that was served both figures should agree.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from speculators.drafts import DRAFTS
from speculators.drafts.base import Draft
from speculators.evaluation.acceptance import AcceptanceCounts
from speculators.features.batch import PackedBatch
from speculators.training.losses import correct_so_far


def load(directory: Path, target: Any) -> Draft:
    """The draft of a checkpoint, ready to predict as at the end of its training."""
    algorithm = json.loads((directory / "config.json").read_text())["speculators_model_type"]
    head = target.get_output_embeddings().weight
    with safe_open(directory / "model.safetensors", "pt") as file:
        if "d2t" in file.keys():  # noqa: SIM118 (it is no mapping)
            d2t = file.get_tensor("d2t")
            head = head[torch.arange(len(d2t)) + d2t]
    draft = DRAFTS[algorithm].from_checkpoint(directory, target.get_input_embeddings().weight, head)
    return draft.eval()


def pack(target: Any, prompt: list[int], answer: list[int], layer_ids: list[int]) -> PackedBatch:
    """One answer with the target's states of it; without the last layer's, since nothing is trained."""
    ids = torch.tensor(prompt + answer)
    states = target.model(ids[None], output_hidden_states=True, use_cache=False).hidden_states
    picked = [states[layer][0] for layer in layer_ids]
    mask = torch.arange(len(ids)) >= len(prompt)
    return PackedBatch(
        rows=[0],
        lengths=[len(ids)],
        token_ids=ids,
        loss_mask=mask,
        hidden_states=torch.stack(picked, dim=1),
        last_hidden_states=torch.empty(0, picked[0].shape[-1]),
        last_index=torch.zeros_like(ids),
    )


@torch.no_grad()
def foreseen(
    draft: Draft, target: Any, answers: list[dict[str, Any]], layer_ids: list[int], positions: int
) -> AcceptanceCounts:
    """Walk through all answers."""
    walk = AcceptanceCounts.empty(positions)
    tokens = draft.vocabulary.tokens
    for answer in answers:
        its = pack(target, answer["prompt_ids"], answer["baseline"]["token_ids"], layer_ids)
        predictions = draft(its)
        said = tokens[(predictions.hidden_states @ draft.lm_head.weight.T).argmax(-1)]
        right = predictions.valid & (said == its.token_ids.roll(-1)[predictions.target_index])
        # The first token of an answer comes out of the prompt: nothing is proposed before it.
        asked = predictions.target_index[0] >= len(answer["prompt_ids"])
        walk.add(predictions.target_index[0, asked].tolist(), correct_so_far(right)[:positions, asked])
    return walk


def main(evaluation: str, checkpoint: str, directory: str, *layers: str) -> None:
    """Print both for every set of prompts."""
    transformers.utils.logging.disable_progress_bar()
    target: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    draft = load(Path(directory), target)
    wanted = [int(layer) for layer in layers] or draft.config["eagle_aux_hidden_state_layer_ids"]
    served = json.loads((Path(evaluation) / "evaluation.json").read_text())
    for name, counted in served["datasets"].items():
        lines = (Path(evaluation) / f"{name}.jsonl").read_text().splitlines()
        positions = served["num_speculative_tokens"]
        walk = foreseen(draft, target, [json.loads(line) for line in lines], wanted, positions).metrics()
        shares = ", ".join(f"{walk[f'acceptance_pos_{i}']:.3f}" for i in range(1, positions + 1))
        print(f"{name}: foreseen {walk['acceptance_length']:.3f} ({shares}), served {counted['acceptance_length']:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
