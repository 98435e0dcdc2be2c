"""C++ kernels for training on a CPU, compiled for the machine when they are first needed.

Between matrix products, training does little work on many numbers, for which torch reads and writes memory once per
operation. These kernels do it once per function: a row of logits becomes a loss and its gradient in a core's cache, in
a tenth of the time (docs/log.md). The other modules of `ops` call them where `kernels` returns them, and compute the
same with torch's operations elsewhere; results differ by rounding.

The compiler is `$CXX` or `c++`; the library is kept in the user's cache. `SPECULATORS_NATIVE=0` turns the kernels off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
HEADER = Path(__file__).with_name("numbers.h")
SWITCH = "SPECULATORS_NATIVE"
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
X86_FLAGS = ["-mprefer-vector-width=512"]
"""Without it, compilers use half of an x86 processor's vector width."""
SHORT = torch.bfloat16
FORMATS = (torch.float32, SHORT)
FLOAT32, INT64 = (torch.float32,), (torch.int64,)
LOSSES = ({"kl": 1.0}, {"ce": 1.0})
"""Mixtures of losses that `Kernels.losses` computes."""


@dataclass(frozen=True, slots=True)
class KeyRanges:
    """Range of context keys that each block of queries sees."""

    first: Tensor
    """First key, int64 [M]."""
    end: Tensor
    """First key after the range, int64 [M]."""
    is_causal: bool = False
    """Whether a query sees none of its block's keys after its own; the queries are a block's last slots."""


class Kernels:
    """The compiled kernels. Tensors are contiguous and in CPU memory.

    Every method raises a ValueError for a tensor of another shape, format or layout, behind whose end a kernel would
    read; the values of indices and ranges are not checked.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.speculators_sum_of_squares.restype = ctypes.c_double

    def losses(
        self, name: str, logits: Tensor, target_logits: Tensor, target_rows: Tensor, weight: Tensor | None,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Compute the loss `name`, "kl" or "ce", of each prediction, as `divergences.loss_and_grad`.

        Arguments and results are those of `loss_and_grad`, but logits and target logits have any of `FORMATS`. Without
        `with_grad`, logits stay as they are. Of equal logits the first counts.
        """
        width = logits.shape[-1]
        _check(
            "losses", logits=(logits, (len(logits), width)), target_logits=(target_logits, (len(target_logits), width))
        )
        _check("losses", INT64, target_rows=(target_rows, (len(logits),)))
        _check("losses", FLOAT32, weight=(weight, (len(logits),)))
        loss, correct = torch.empty(len(logits)), torch.empty(len(logits), dtype=torch.bool)
        self._call(
            "losses", name == "ce", logits, logits.dtype is SHORT, target_logits, target_logits.dtype is SHORT,
            target_rows, weight, *logits.shape, with_grad, loss, correct,
        )  # fmt: skip
        return loss, correct

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Compute `functional.rms_norm` of x [..., W], from and to any of `FORMATS`; `weight` float32 [W].

        Returns: the normed rows, and 1 / sqrt(mean square + eps) of each, float32 [...].
        """
        _check("rms_norm", x=(x, x.shape))
        _check("rms_norm", FLOAT32, weight=(weight, x.shape[-1:]))
        out, inverse = torch.empty_like(x, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)
        self._call(
            "rms_norm", x, x.dtype is SHORT, weight, out, dtype is SHORT, inverse, inverse.numel(), x.shape[-1], eps
        )
        return out, inverse

    def rms_norm_backward(self, grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x, in its format, and of the weight, from that of the output, `FORMATS` [..., W]."""
        _check("rms_norm", x=(x, x.shape), grad=(grad, x.shape))
        _check("rms_norm", FLOAT32, weight=(weight, x.shape[-1:]), inverse=(inverse, x.shape[:-1]))
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        self._call(
            "rms_norm_backward", grad, grad.dtype is SHORT, x, x.dtype is SHORT, weight, inverse, grad_x, grad_weight,
            inverse.numel(), x.shape[-1],
        )  # fmt: skip
        return grad_x, grad_weight

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """Compute `functional.silu_mul`; all tensors have one shape and one of `FORMATS`."""
        _check("silu_mul", gate=(gate, up.shape), up=(up, up.shape))
        _check("silu_mul", (up.dtype,), gate=(gate, up.shape))
        out = torch.empty_like(up)
        self._call("silu_mul", gate, up, out, out.dtype is SHORT, out.numel())
        return out

    def silu_mul_backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of `gate` and `up` from that of the output, of the same format and shape."""
        _check("silu_mul", grad=(grad, up.shape), gate=(gate, up.shape), up=(up, up.shape))
        _check("silu_mul", (up.dtype,), grad=(grad, up.shape), gate=(gate, up.shape))
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        self._call("silu_mul_backward", grad, gate, up, grad_gate, grad_up, up.dtype is SHORT, up.numel())
        return grad_gate, grad_up

    def apply_rotary(self, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        """Compute `functional.apply_rotary` from and to any of `FORMATS`; with -sin it is the backward pass."""
        per_position = (*x.shape[:-2], 1, x.shape[-1])  # one angle for all heads
        _check("apply_rotary", x=(x, x.shape))
        _check("apply_rotary", FLOAT32, cos=(cos, per_position), sin=(sin, per_position))
        out = torch.empty_like(x, dtype=dtype)
        rows = cos.numel() // x.shape[-1]
        self._call("apply_rotary", x, x.dtype is SHORT, cos, sin, out, dtype is SHORT, rows, *x.shape[-2:])
        return out

    def attention(self, ranges: KeyRanges, q: Tensor, *key_values: Tensor) -> tuple[Tensor, Tensor]:
        """Attend from blocks of queries to ranges of a context, and to the block's own few keys; all float32.

        Args:
            ranges: context keys that each block sees.
            q: queries [M, L, Q, D].
            key_values: keys and values of the context, [C, G, D] each, and of the blocks, [M, S, G, D] each.

        Returns: the output [M, L, Q, D], and the logsumexp of each query's scores [M, L, Q].
        """
        _check_attention(ranges, q, *key_values)
        out, logsumexp = torch.empty_like(q), q.new_empty(q.shape[:-1])
        self._call(
            "attention", q, *key_values, ranges.first, ranges.end, out, logsumexp, *_sizes(ranges, q, key_values)
        )
        return out, logsumexp

    def attention_backward(
        self, grad: Tensor, out: Tensor, logsumexp: Tensor, ranges: KeyRanges, q: Tensor, *key_values: Tensor
    ) -> list[Tensor]:
        """Gradients of queries and of all keys and values, from that of the output [M, L, Q, D]."""
        _check_attention(ranges, q, *key_values)
        _check("attention", FLOAT32, grad=(grad, q.shape), out=(out, q.shape), logsumexp=(logsumexp, q.shape[:-1]))
        grads = [torch.empty_like(tensor) for tensor in (q, *key_values)]
        self._call(
            "attention_backward", grad, out, logsumexp, q, *key_values, ranges.first, ranges.end, *grads,
            *_sizes(ranges, q, key_values),
        )  # fmt: skip
        return grads

    def nesterov_momentum(
        self, momentum: Tensor, grad: Tensor, direction: Tensor | None, beta: float, grad_factor: float,
        lookahead_factor: float,
    ) -> None:  # fmt: skip
        """Update in place: m = beta * m + grad_factor * grad, direction = m + lookahead_factor * grad; all [k, n].

        The momentum is float32, the others of `FORMATS`; `direction` may be None, or a transposed view.
        """
        transposed, short = False, direction is not None and direction.dtype is SHORT
        if direction is not None and not direction.is_contiguous():
            direction, transposed = direction.mT, True
        rows, columns = momentum.shape
        _check("nesterov_momentum", FLOAT32, momentum=(momentum, momentum.shape))
        _check("nesterov_momentum", grad=(grad, momentum.shape))
        _check("nesterov_momentum", direction=(direction, (columns, rows) if transposed else (rows, columns)))
        self._call(
            "nesterov_momentum", momentum, grad, grad.dtype is SHORT, direction, short, *momentum.shape, transposed,
            beta, grad_factor, lookahead_factor,
        )  # fmt: skip

    def polynomial(self, x: Tensor, square: Tensor, factors: Tensor) -> None:
        """Set symmetric matrices, bfloat16 [B, k, k], to a I + b x + c x^2; `factors` a, b, c: float32 [B, 3]."""
        _check("polynomial", (SHORT,), x=(x, (len(x), *x.shape[-1:] * 2)), square=(square, x.shape))
        _check("polynomial", FLOAT32, factors=(factors, (len(x), 3)))
        self._call("polynomial", x, square, factors, *x.shape[:2])

    def apply_update(self, weight: Tensor, rounded: Tensor | None, update: Tensor, keep: float, size: float) -> None:
        """Set a float32 weight, and its bfloat16 copy if there is one, to keep * weight - size * update.

        `update` has one of `FORMATS`. The weight's version counter stays as it is.
        """
        _check("apply_update", FLOAT32, weight=(weight, weight.shape))
        _check("apply_update", (SHORT,), rounded=(rounded, weight.shape))
        _check("apply_update", update=(update, weight.shape))
        self._call("apply_update", weight, rounded, update, update.dtype is SHORT, weight.numel(), keep, size)

    def sum_of_squares(self, x: Tensor) -> float:
        """Sum the squares of a tensor of one of `FORMATS`."""
        _check("sum_of_squares", x=(x, x.shape))
        total: float = self._call("sum_of_squares", x, x.dtype is SHORT, x.numel())
        return total

    def _call(self, name: str, *arguments: Tensor | float | None) -> Any:
        function = getattr(self.library, f"speculators_{name}")
        return function(*map(_c_argument, arguments), ctypes.c_int(torch.get_num_threads()))


def _check(
    kernel: str, formats: Sequence[torch.dtype] = FORMATS, **tensors: tuple[Tensor | None, Sequence[int]]
) -> None:
    """Check format, layout and shape of tensors, given as (tensor, its shape); None is left out.

    Raises:
        ValueError: one differs.
    """
    for name, (tensor, shape) in tensors.items():
        if tensor is None or (
            tensor.shape == shape and tensor.dtype in formats and tensor.is_contiguous() and tensor.is_cpu
        ):
            continue
        layout = f"{'' if tensor.is_contiguous() else 'non-contiguous '}{tensor.device.type}"
        raise ValueError(
            f"{kernel}: {name} is {layout} {tensor.dtype} {list(tensor.shape)}, must be contiguous cpu "
            f"{' or '.join(map(str, formats))} {list(shape)}"
        )


def _check_attention(ranges: KeyRanges, q: Tensor, *key_values: Tensor) -> None:
    """Check the tensors of `Kernels.attention`."""
    blocks, length, heads, width = q.shape
    context, groups, slots = len(key_values[0]), key_values[0].shape[1], key_values[2].shape[1]
    shapes = [(context, groups, width)] * 2 + [(blocks, slots, groups, width)] * 2
    names = ("keys", "values", "block_keys", "block_values")
    _check("attention", FLOAT32, q=(q, q.shape), **dict(zip(names, zip(key_values, shapes, strict=True), strict=True)))
    _check("attention", INT64, first=(ranges.first, (blocks,)), end=(ranges.end, (blocks,)))
    if heads % groups or (ranges.is_causal and slots < length):
        raise ValueError(f"attention: {heads} query heads on {groups} groups, {length} queries in {slots} slots")


def _sizes(ranges: KeyRanges, q: Tensor, key_values: Sequence[Tensor]) -> tuple[int, ...]:
    """The sizes [M, L, Q, D], [C, G] and S of the tensors of `Kernels.attention`, and whether ranges are causal."""
    return (*q.shape, *key_values[0].shape[:2], key_values[2].shape[1], ranges.is_causal)


def _c_argument(argument: Tensor | float | None) -> Any:
    if isinstance(argument, Tensor):
        assert argument.is_contiguous()
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, bool):
        return ctypes.c_int(argument)
    if argument is None:
        return None
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


def kernels(*tensors: Tensor) -> Kernels | None:
    """Return the kernels if all tensors have one of `FORMATS` and are on a CPU, and the kernels compile; else None."""
    supported = all(tensor.device.type == "cpu" and tensor.dtype in FORMATS for tensor in tensors)
    loaded = _load() if supported else ""
    return loaded if isinstance(loaded, Kernels) else None


def missing() -> str:
    """Return the reason why there are no kernels; empty if there are."""
    loaded = _load()
    return "" if isinstance(loaded, Kernels) else loaded


@functools.cache
def _load() -> Kernels | str:
    """Compile and load the kernels, or return the reason why that fails."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH} is 0"
    try:
        _share_openmp()
        return Kernels(ctypes.CDLL(str(_library())))
    except subprocess.CalledProcessError as error:
        return f"{error.cmd[0]} ended with {error.returncode}: {(error.stderr or '').strip()[-500:]}"
    except (OSError, RuntimeError, ValueError) as error:  # no home directory; quotes in `$CXX` that do not match
        return str(error)


def _library() -> Path:
    """Return the path of the library compiled from these sources, by this compiler, for this machine."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")  # such as `ccache c++`
    flags = FLAGS + (X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else [])
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    machine = re.findall(r"^(?:model name|flags|Features)\s*:.*$", _read("/proc/cpuinfo"), re.MULTILINE)
    texts = [path.read_text() for path in (HEADER, *SOURCES)]
    identity = "\0".join([*texts, *flags, version, platform.machine(), *sorted(set(machine))])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "speculators-native"
    library = cache / f"{hashlib.sha256(identity.encode()).hexdigest()[:20]}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            compiled, units = Path(scratch) / "compiled.so", [str(Path(scratch) / f"{path.stem}.o") for path in SOURCES]
            steps = [[*flags, "-c", str(path), "-o", unit] for path, unit in zip(SOURCES, units, strict=True)]
            # Linked without OpenMP, whose functions torch's own library provides (`_share_openmp`).
            for step in [*steps, ["-shared", *units, "-o", str(compiled)]]:
                subprocess.run([*compiler, *step], capture_output=True, text=True, check=True)
            compiled.replace(library)  # atomic: another process may compile at the same time
    return library


def _share_openmp() -> None:
    """Let the kernels use the OpenMP library that torch has loaded: two would wait for each other's idle threads."""
    for path in sorted(set(re.findall(r"\S*/lib(?:gomp|iomp5|omp)\b\S*", _read("/proc/self/maps")))):
        ctypes.CDLL(path, ctypes.RTLD_GLOBAL)


def _read(path: str) -> str:
    """Read a file of Linux's /proc; empty on other systems."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
