"""Plants faults one at a time in a copy of the package and runs the tests that have to catch each.

    python -m tests.benchmarks.planted_faults [WORD ...]

Prints a Markdown table: the fault, and the first test that failed because of it. WORD limits the run to faults that
have the word in their name or file. First all tests run without a fault, and the time they take is printed. Exit code 1
if a fault is not caught, 2 if the text of a fault is not found exactly once, since the source has changed then.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
COPIED = ("speculators", "tests", "recipes", "conf", "pyproject.toml", "README.md")
SECONDS = 180.0
"""Time limit of the tests of one fault."""

RULES = "tests/training/test_update_rules.py"
EAGLE3 = "tests/training/test_golden_losses.py::test_losses_are_the_golden_ones[eagle3_adamw-{}]"
DFLASH = "tests/training/test_golden_losses.py::test_losses_are_the_golden_ones[dflash_adamw-{}]"
PACKS = "tests/data/test_golden_packs.py"
ENCODING = "tests/features/test_golden_encoding.py"
FEATURES = "tests/features/test_encoding.py"
VOCAB = "tests/stages/test_vocab.py"
TOKENIZE = "tests/stages/test_tokenize.py"
TABLE = "tests/data/test_token_table.py"
ACCEPTANCE = "tests/evaluation/test_acceptance.py"
CANONICAL = "tests/runner/planning/test_key.py::test_the_canonical_text_is_pinned"
KEYS = "tests/runner/planning/test_key.py::test_keys_are_the_golden_ones"
OPS = "tests/ops/test_ops.py::test_an_implementation_computes_what_the_reference_does[{}]"
CAUSAL = OPS.format("{}: causal attention, 2 later steps, width 8, short, float32")
ANCHORED = OPS.format("{}: anchored attention, causal True, window 40, 4 queries, {}, float32")
FUSED = OPS.format("torch: distillation_loss, trained head True, reweighted True, float32")
MUON = OPS.format("{}: Muon, blocks of {}, {}")
DOCUMENTS = "tests/drafts/test_eagle3.py::test_predictions_stay_in_their_document_and_follow_the_supervision"
DPACE = "tests/drafts/test_dflash.py::test_dpace_weighs_a_place_by_how_likely_it_and_later_ones_are_reached"
ROUNDED = "tests/training/test_optim.py::test_whoever_keeps_a_rounded_weight_sees_that_it_has_moved"


@dataclass(frozen=True, slots=True)
class Fault:
    """One change to the package that makes it wrong."""

    name: str
    file: str
    """Below `speculators/`."""
    old: str
    new: str
    tests: str
    """What pytest has to run: a file, or one test of it."""


FAULTS = [
    Fault("Muon's momentum 0.5", "config/schema.py", "muon_momentum: float = if_set(0.95,",
          "muon_momentum: float = if_set(0.5,", RULES),
    Fault("AdamW's betas 0.5, 0.5", "config/schema.py", "if_set([0.9, 0.95],", "if_set([0.5, 0.5],", RULES),
    Fault("AdamW's eps 1e-2", "config/schema.py", "adamw_eps: float = if_set(1e-8,",
          "adamw_eps: float = if_set(1e-2,", RULES),
    Fault("Muon's updates scaled by the shorter side", "ops/muon.py", "math.sqrt(max(shape))", "math.sqrt(min(shape))",
          RULES),
    Fault("weight decay with the wrong sign", "training/optim.py", "1.0 - lr * self.muon_weight_decay",
          "1.0 + lr * self.muon_weight_decay", RULES),
    Fault("no Nesterov step", "ops/muon.py", "direction, beta, factor, factor / beta)",
          "direction, beta, factor, 0.0)", RULES),
    Fault("cosine schedule that rises", "training/optim.py", "0.5 * (1.0 - math.cos(", "0.5 * (1.0 + math.cos(", RULES),
    Fault("warm-up one step late", "training/optim.py", "return (step + 1) / warmup_steps",
          "return step / warmup_steps", RULES),
    Fault("a rounded weight is kept when the weight changes (stale cache)", "ops/weights.py",
          "elif copy.version != weight._version:", "elif copy.version > weight._version:", ROUNDED),
    Fault("later steps at the position of the first", "drafts/eagle3.py", "position_ids[layout.query_index] + step",
          "position_ids[layout.query_index]", EAGLE3.format("cpp")),
    Fault("predictions across documents", "drafts/eagle3.py", "inside_KS & batch.loss_mask[target_KS]",
          "batch.loss_mask[target_KS]", DOCUMENTS),
    Fault("the final norm is left out", "drafts/eagle3.py", "normed = self.norm(hidden_states)",
          "normed = hidden_states", EAGLE3.format("cpp")),
    Fault("each step sees the token of the step before", "drafts/eagle3.py", "layout.tokens[min(step + 1,",
          "layout.tokens[min(step,", EAGLE3.format("cpp")),
    Fault("the norm of the context is left out", "drafts/dflash.py", "self.hidden_norm(self.fc(fc_input))",
          "self.fc(fc_input)", DFLASH.format("cpp")),
    Fault("another token stands for the mask", "drafts/dflash.py", "new_tensor([self.mask_token_id])",
          "new_tensor([0])", DFLASH.format("cpp")),
    Fault("blocks propose one position early", "drafts/dflash.py", "q, hidden_states = q[:, 1:], hidden_states[:, 1:]",
          "q, hidden_states = q[:, :-1], hidden_states[:, :-1]", DFLASH.format("cpp")),
    Fault("D-PACE mixes with 1 - alpha", "drafts/dflash.py", "(1.0 - alpha) * torch.exp(-divergence) + alpha",
          "alpha * torch.exp(-divergence) + (1.0 - alpha)", DPACE),
    Fault("C++ norm without eps", "ops/kernels.cpp", "std::sqrt(squares / float(width) + eps)",
          "std::sqrt(squares / float(width))", OPS.format("cpp: rms_norm, float32")),
    Fault("C++ gradient of the norm with the wrong sign", "ops/kernels.cpp", "multiply_add(-projection,",
          "multiply_add(projection,", OPS.format("cpp: rms_norm, float32")),
    Fault("C++ gradient of SiLU with the wrong sign", "ops/kernels.cpp", "1.0f - s, s)",
          "1.0f + s, s)", OPS.format("cpp: silu_mul, float32")),
    Fault("C++ rotary embedding with sin for cos", "ops/functional.py", "cos.contiguous(), sin.contiguous())",
          "sin.contiguous(), cos.contiguous())", OPS.format("cpp: apply_rotary, float32")),
    Fault("gradient rotated forwards", "ops/autograd.py", "cos, -sin, ctx.dtype",
          "cos, sin, ctx.dtype", OPS.format("cpp: apply_rotary, float32")),
    Fault("gradient of a weight with the wrong sign", "ops/autograd.py", "grad.T @ x if",
          "-grad.T @ x if", OPS.format("cpp: linear, bfloat16")),
    Fault("C++ causal attention that does not see its own position", "ops/attention.py", "mask.last + 1)",
          "mask.last)", CAUSAL.format("cpp")),
    Fault("C++ causal block that sees one slot less", "ops/attention.cpp", "slots - length + 1 + i",
          "slots - length + i", ANCHORED.format("cpp", "short")),
    Fault("C++ gradient of a softmax with the wrong sign", "ops/attention.cpp", "(h[j] - mean)",
          "(h[j] + mean)", CAUSAL.format("cpp")),
    Fault("C++ gradient of the KL divergence with the wrong sign", "ops/kernels.cpp", "-p[j] * row_weight",
          "p[j] * row_weight", OPS.format("cpp: loss_and_grad, 1.0 kl, float32")),
    Fault("C++ gradient of the cross-entropy with the wrong sign", "ops/kernels.cpp", "factor, -row_weight)",
          "factor, row_weight)", OPS.format("cpp: loss_and_grad, 1.0 ce, float32")),
    Fault("C++ Nesterov step backwards", "ops/kernels.cpp", "multiply_add(x, lookahead_factor,",
          "multiply_add(x, -lookahead_factor,", MUON.format("cpp", 0, "float32")),
    Fault("C++ polynomial with the wrong sign", "ops/kernels.cpp", "to_float(g[j]), f[2]",
          "to_float(g[j]), -f[2]", MUON.format("cpp", 0, "bfloat16")),
    Fault("C++ update uphill", "ops/kernels.cpp", "-size * to_float",
          "size * to_float", MUON.format("cpp", 0, "float32")),
    Fault("C++ sum of squares without the first", "ops/kernels.cpp", "begin = count * chunk / CHUNKS,",
          "begin = count * chunk / CHUNKS + (chunk == 0),", OPS.format("cpp: grad_norm, float32")),
    Fault("norm without eps", "ops/functional.py", "weight, eps)\n\n\ndef rotate",
          "weight, 0.0)\n\n\ndef rotate", OPS.format("torch: rms_norm, float32")),
    Fault("rotary embedding that rotates one half the wrong way", "ops/functional.py", "torch.cat([-second, first]",
          "torch.cat([second, first]", OPS.format("torch: apply_rotary, float32")),
    Fault("sigmoid for SiLU", "ops/functional.py", "nn.functional.silu(gate)",
          "nn.functional.sigmoid(gate)", OPS.format("torch: silu_mul, float32")),
    Fault("blockwise causal attention that does not see its own position", "ops/blockwise.py",
          "positions[None, :] > last", "positions[None, :] >= last", CAUSAL.format("torch")),
    Fault("blocks that see the position of their anchor", "ops/blockwise.py", "(positions >= end",
          "(positions > end", ANCHORED.format("torch", "longer than a chunk")),
    Fault("a window one token too small", "ops/masks.py", "(end[-1] - window)",
          "(end[-1] - window + 1)", ANCHORED.format("torch", "longer than a chunk")),
    Fault("flex attention that does not see its own position", "ops/gpu.py", "key <= last[query]",
          "key < last[query]", CAUSAL.format("flex")),
    Fault("flex attention to the position of the anchor", "ops/gpu.py", "(key < end[block])",
          "(key <= end[block])", ANCHORED.format("flex", "short")),
    Fault("gradient of the KL divergence with the wrong sign", "ops/divergences.py", "q.sub_(p_rows)",
          "q.add_(p_rows)", OPS.format("torch: loss_and_grad, 1.0 kl, float32")),
    Fault("gradient of the cross-entropy without its label", "ops/divergences.py", "full_like(z[:, :1], -1.0)",
          "full_like(z[:, :1], 0.0)", OPS.format("torch: loss_and_grad, 1.0 ce, float32")),
    Fault("reversed KL divergence that is not", "ops/divergences.py", "(both.log_q - both.log_p).mul_",
          "(both.log_p - both.log_q).mul_", OPS.format("torch: loss_and_grad, 1.0 rkl, float32")),
    Fault("Jensen-Shannon divergence without its half", "ops/divergences.py",
          "return 0.5 * (p_terms.sum(-1) + q_terms.sum(-1))", "return p_terms.sum(-1) + q_terms.sum(-1)",
          OPS.format("torch: loss_and_grad, 1.0 js, float32")),
    Fault("total variation with the wrong sign", "ops/divergences.py", "h.sub_(both.undershooting_q(), alpha",
          "h.add_(both.undershooting_q(), alpha", OPS.format("torch: loss_and_grad, 1.0 tv, float32")),
    Fault("likelihood of acceptance with the wrong sign", "ops/divergences.py", "h.sub_(share, alpha",
          "h.add_(share, alpha", OPS.format("torch: loss_and_grad, 1.0 nla, float32")),
    Fault("hybrid loss with another eta", "ops/divergences.py", "ETA = 3.0",
          "ETA = 2.0", OPS.format("torch: loss_and_grad, 1.0 lk_hybrid, float32")),
    Fault("final norm of the target without eps", "ops/distillation.py", "self.norm_weight, self.norm_eps)",
          "self.norm_weight, 0.0)", FUSED),
    Fault("soft cap that does not scale", "ops/distillation.py", "torch.tanh(logits / self.softcap)",
          "torch.tanh(logits)", FUSED),
    Fault("gradient of the head with the wrong sign", "ops/distillation.py", "_add_product(grad_head, grad_logits.T",
          "_add_product(grad_head, -grad_logits.T", FUSED),
    Fault("loss of hidden states that is not relative", "ops/distillation.py",
          "target_hidden_states.square().sum(-1).clamp(min=1e-12)", "1.0", OPS.format("torch: hidden_state_loss")),
    Fault("Muon's momentum with the factors exchanged", "ops/muon.py", "(1.0 - beta) * grad_factor\n    if",
          "beta * grad_factor\n    if", MUON.format("torch", 0, "float32")),
    Fault("Muon's rational function without the matrix itself", "ops/muon.py", ".add_(1.0)\n    return x, factor",
          ".add_(0.0)\n    return x, factor", MUON.format("torch", 0, "float32")),
    Fault("Muon's chain without a quintic", "ops/muon.py", "enumerate(QUINTICS)",
          "enumerate(QUINTICS[:-1])", MUON.format("torch", 0, "bfloat16")),
    Fault("Muon's chain with a term's wrong sign", "ops/muon.py", ".addcmul_(c[:, None],",
          ".addcmul_(-c[:, None],", MUON.format("torch", 0, "bfloat16")),
    Fault("packs that do not change with the epoch", "data/packing.py", 'random.Random(f"{seed} {epoch}")',
          'random.Random(f"{seed}")', PACKS),
    Fault("another salt for the validation split", "data/packing.py", 'f"validation {conversation}"',
          'f"{conversation}"', PACKS),
    Fault("scales twice as large", "features/encoding.py", "exponent - 9, exponent - 8)", "exponent - 8, exponent - 7)",
          ENCODING),
    Fault("largest value of float8 240", "features/encoding.py", "LARGEST = 448.0", "LARGEST = 240.0", ENCODING),
    Fault("the wrong layer is kept as the last", "features/encoding.py", "tensor[:, :-1].contiguous()",
          "tensor[:, 1:].contiguous()", FEATURES),
    Fault("d2t with the wrong sign", "stages/vocab.py", "ids - torch.arange(len(ids))",
          "torch.arange(len(ids)) - ids", VOCAB),
    Fault("the rarest tokens are kept", "stages/vocab.py", "np.argsort(-counts", "np.argsort(counts", VOCAB),
    Fault("prompts between answers are supervised", "data/template.py", "[0] * len(between)", "[1] * len(between)",
          TOKENIZE),
    Fault("the answer is part of its own prompt", "data/template.py", "_render(tokenizer, messages[:i],",
          "_render(tokenizer, messages[: i + 1],", TOKENIZE),
    Fault("the target is asked one position late", "data/token_table.py", "np.append(supervised[1:], False)",
          "np.append(False, supervised[:-1])", TABLE),
    Fault("the target's own token is not counted as progress", "evaluation/acceptance.py", "+ lengths[index] + 1,",
          "+ lengths[index],", ACCEPTANCE),
    Fault("acceptance length without the bonus token", "evaluation/acceptance.py", "1.0 + sum(shares)", "sum(shares)",
          ACCEPTANCE),
    Fault("keys without the stage's version", "runner/planning/key.py", '"version": version,', '"version": 1,', KEYS),
    Fault("keys without the inputs", "runner/planning/key.py", '"inputs": dict(inputs),', '"inputs": {},', KEYS),
    Fault("keys that depend on the order of options", "runner/planning/key.py", "sort_keys=True", "sort_keys=False",
          KEYS),
]  # fmt: skip


def run(root: Path, *arguments: str) -> tuple[int, str]:
    """Run pytest in a copy. Gives its exit code and its output; 124 where it takes longer than `SECONDS`."""
    env = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "400"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments]
    try:
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return 124, ""
    return done.returncode, done.stdout + done.stderr


def planted(fault: Fault, root: Path) -> str:
    """Plant a fault, run its tests, take it out again. Gives the name of the test that failed; empty if none did."""
    path = root / "speculators" / fault.file
    source = path.read_text()
    path.write_text(source.replace(fault.old, fault.new))
    code, output = run(root, fault.tests)
    path.write_text(source)
    if code == 124:
        return f"no test within {SECONDS:.0f} s"
    failed = re.search(r"^(?:FAILED|ERROR) \S+?::(\w+)", output, re.MULTILINE)
    return failed[1] if code == 1 and failed else ""


def main(words: list[str]) -> int:
    """Plant every fault that has one of the words, or all."""
    chosen = [f for f in FAULTS if not words or any(word in f"{f.name} {f.file}" for word in words)]
    for fault in chosen:
        count = (ROOT / "speculators" / fault.file).read_text().count(fault.old)
        if count != 1:
            print(f"error: {fault.file} has {count} times `{fault.old}`\n\nhint: update FAULTS", file=sys.stderr)
            return 2
    missed = 0
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif (ROOT / name).exists():
                shutil.copy(ROOT / name, root / name)
        began = time.monotonic()
        code, output = run(root, *sorted({fault.tests for fault in chosen}))
        if code:
            print(output, file=sys.stderr)
            return 2
        print(f"Without a fault all of these tests pass, in {time.monotonic() - began:.0f} s.\n")
        print("| fault | file | caught by |\n|---|---|---|", flush=True)
        for fault in chosen:
            test = planted(fault, root)
            missed += not test
            print(f"| {fault.name} | `{fault.file}` | {f'`{test}`' if test else '**nothing**'} |", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
