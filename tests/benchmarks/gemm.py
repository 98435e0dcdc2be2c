"""The bound: what matrix products this machine makes, at the sizes of the demo.

    python tests/benchmarks/gemm.py
    LD_PRELOAD=.venv/lib/libiomp5.so python tests/benchmarks/gemm.py

Rows 48 and 512 are training steps; rows 1 to 128 a step of a served target with that many tokens in it (30 layers, head
of 49152), by torch and by the product that vLLM uses on a CPU. They tell what verifying k + 1 tokens costs against
generating one.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

SHAPES = ((1152, 960), (576, 3072), (1536, 576), (576, 12000))
LAYER = ((960, 576), (576, 576), (3072, 576), (576, 1536))


def seconds(call: Callable[[], object], least: float = 1.0) -> float:
    """Median time of a call over at least `least` seconds, after one that is not counted."""
    call()
    times: list[float] = []
    while sum(times) < least:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def engine_linear(weight: Tensor) -> Callable[[Tensor], Tensor] | None:
    """The product as vLLM prepares it for a CPU; None where there is no such vLLM."""
    try:
        from vllm import _custom_ops as ops
        from vllm.platforms import current_platform

        current_platform.import_kernels()
        handler = ops.create_onednn_mm(weight.t(), 32)
    except (ImportError, AttributeError):
        return None
    return lambda x: ops.onednn_mm(handler, x, None)


def main() -> None:
    """Print both tables."""
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (48, 512):
            for k, n in SHAPES:
                x, w = torch.randn(rows, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
                rate = 2 * rows * k * n / seconds(lambda x=x, w=w: linear(x, w), 0.3) / 1e9  # type: ignore[misc]
                print(f"{dtype!s:15} {rows:4} x {k} x {n}: {rate:.0f} GFLOP/s")
    weights = [[torch.randn(o, i) for o, i in LAYER] for _ in range(30)] + [[torch.randn(49152, 576)]]
    engine = [[engine_linear(w) for w in layer] for layer in weights]
    for rows in (1, 2, 4, 8, 16, 32, 64, 128):
        inputs = {width: torch.randn(rows, width) for width in (576, 1536)}

        def by_torch(inputs: dict[int, Tensor] = inputs) -> None:
            for layer in weights:
                for w in layer:
                    linear(inputs[w.shape[1]], w)

        def by_engine(inputs: dict[int, Tensor] = inputs) -> None:
            for layer, products in zip(weights, engine, strict=True):
                for w, product in zip(layer, products, strict=True):
                    assert product is not None
                    product(inputs[w.shape[1]])

        line = (
            f"float32, {rows:3} tokens through a target of SmolLM2-135M's size: torch {1e3 * seconds(by_torch):.0f} ms"
        )
        print(line + (f", vLLM {1e3 * seconds(by_engine):.0f} ms" if engine[0][0] else ""))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
