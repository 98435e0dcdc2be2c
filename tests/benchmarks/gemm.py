"""The bound: what matrix products this machine makes, at the sizes of the demo. `python tests/benchmarks/gemm.py`.

Rows 512 are a training step; rows 1 to 32 a step of a served target with that many tokens in it (30 layers, head of
49152), which tells what verifying k + 1 tokens costs against generating one.
"""

from __future__ import annotations

import time

import torch
from torch.nn.functional import linear

SHAPES = ((1152, 960), (576, 3072), (1536, 576), (576, 8000))
LAYER = ((960, 576), (576, 576), (3072, 576), (576, 1536))


def seconds(call: object, least: float = 0.5) -> float:
    """Mean time of a call, over at least `least` seconds, after one that is not counted."""
    call()  # type: ignore[operator]
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < least:
        call()  # type: ignore[operator]
        count += 1
    return (time.perf_counter() - began) / count


def main() -> None:
    """Print both tables."""
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    for dtype in (torch.float32, torch.bfloat16):
        for k, n in SHAPES:
            x, w = torch.randn(512, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
            rate = 2 * 512 * k * n / seconds(lambda x=x, w=w: linear(x, w)) / 1e9
            print(f"{dtype!s:15} 512 x {k} x {n}: {rate:.0f} GFLOP/s")
    layers = [[torch.randn(o, i) for o, i in LAYER] for _ in range(30)]
    head = torch.randn(49152, 576)
    for rows in (1, 4, 8, 32):
        x = torch.randn(rows, 576)

        def step(x: torch.Tensor = x) -> torch.Tensor:
            for qkv, o, up, down in layers:
                x = linear(linear(linear(linear(x, qkv)[:, :576], o), up)[:, :1536], down)
            return linear(x, head)

        print(f"float32, {rows:2} tokens through a target of SmolLM2-135M's size: {1e3 * seconds(step):.0f} ms")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
