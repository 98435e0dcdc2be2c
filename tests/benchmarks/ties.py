"""How far rounding moves the gap between the two most probable tokens, by the format that a target computes in.

    python tests/benchmarks/ties.py CHECKPOINT [DTYPE...]

Eight prompts are answered greedily with a KV cache, 48 tokens each, and the same tokens are prefilled in one pass, with
transformers on one thread. Both give a log-probability to the two tokens that the decoding holds most probable; the
difference of the two gaps is what a server that verifies several tokens in a step may differ by from one that decodes
them one by one. `evaluation.lossless.TOLERANCES` has to be above it, or a tie would count as a fault.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = (
    "Write a Python function that reverses a list.", "What is the capital of France?", "Explain how a bicycle works.",
    "Tell me a story about a dragon.", "def fibonacci(n):", "List five healthy breakfasts.", "Why is the sky blue?",
    "Summarise the plot of Hamlet.",
)  # fmt: skip
TOKENS = 48


def gaps(logprobs: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """Distance in nats of the log-probabilities of two tokens at each position: [T, V], [T, 2] -> [T]."""
    return (logprobs.gather(1, top[:, :1]) - logprobs.gather(1, top[:, 1:])).squeeze(1)


@torch.no_grad()
def differences(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Differences of the gaps along the greedy answer to a prompt [1, T], in nats."""
    prompt, cache, last, decoded = ids.shape[1], None, ids, []
    for _ in range(TOKENS):
        out = model(last, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        decoded.append(out.logits[0, -1].float().log_softmax(-1))
        last = decoded[-1].argmax().view(1, 1)
        ids = torch.cat([ids, last], 1)
    prefilled = model(ids).logits[0].float().log_softmax(-1)[prompt - 1 : -1]
    top = torch.stack(decoded).topk(2, -1).indices
    return (gaps(torch.stack(decoded), top) - gaps(prefilled, top)).abs()


def main(checkpoint: str, *dtypes: str) -> None:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for dtype in dtypes or ("float32", "bfloat16", "float16"):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()
        chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
        prompts = [
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
            for chat in chats
        ]
        found = torch.cat([differences(model, prompt["input_ids"]) for prompt in prompts]).sort().values
        most, median = found[-1].item(), found[len(found) // 2].item()
        print(f"{dtype}: {len(found)} positions, at most {most:.2g} nats, median {median:.2g}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
