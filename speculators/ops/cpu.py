"""Kernels in C++ for training on a CPU, compiled for the machine when they are first needed.

After a matrix product comes small work on many numbers, for which torch goes through memory once per operation. Here a
row of logits becomes a loss and its gradient while it is in a core's cache, which takes a tenth of the time
(docs/log.md). `functional`, `attention`, `training.losses` and `training.optim` compute the same in torch where there
are no kernels; results differ by rounding.

The compiler is `$CXX` or `c++`; the library is kept in the user's cache. `SPECULATORS_NATIVE=0` turns the kernels off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speculators.config.algorithms import Loss

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
HEADER = Path(__file__).with_name("numbers.h")
SWITCH = "SPECULATORS_NATIVE"
FLAGS = [
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fPIC",
    "-fopenmp",
]
WIDE = ["-mprefer-vector-width=512"]
"""On x86, whose compilers use half of the vector width unless told."""
SHORT = torch.bfloat16
FORMATS = (torch.float32, SHORT)
LOSSES = ({Loss.kl: 1.0}, {Loss.ce: 1.0})


@dataclass(frozen=True, slots=True)
class KeyRanges:
    """Context that each block of queries sees, as one range of keys."""

    first: Tensor
    """First key, int64 [M]."""
    end: Tensor
    """First key after the range, int64 [M]."""
    is_causal: bool = False
    """Whether the queries are those of a block's last slots, and see none of its own keys after their own."""


class Kernels:
    """The compiled kernels. All tensors are contiguous and in CPU memory."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.speculators_sum_of_squares.restype = ctypes.c_double

    def losses(
        self, kind: Loss, z: Tensor, target: Tensor, local: Tensor, weight: Tensor | None, with_grad: bool
    ) -> tuple[Tensor, Tensor]:
        """Compute the loss of each prediction, and whether the draft's argmax is the target's.

        Args:
            kind: one of `LOSSES`.
            z: the draft's logits [n, V], `FORMATS`; with `with_grad` overwritten by weight * d loss / d z.
            target: the target's logits [u, V], `FORMATS`.
            local: row of `target` of each prediction, int64 [n]; fastest where equal ones are neighbours.
            weight: float32 [n]; 1 if None.
            with_grad: whether to compute gradients.

        Returns: float32 [n]; bool [n], where of equal logits the first one counts.
        """
        loss, correct = torch.empty(len(z)), torch.empty(len(z), dtype=torch.bool)
        self._call(
            "losses", kind is Loss.ce, z, z.dtype is SHORT, target, target.dtype is SHORT, local, weight, *z.shape,
            with_grad, loss, correct,
        )  # fmt: skip
        return loss, correct

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As `functional.rms_norm`.

        Args:
            x: `FORMATS` [..., W].
            weight: float32 [W].
            eps: added to the mean of the squares.
            dtype: of the result, of `FORMATS`.

        Returns: of x's shape; and each row's 1 / sqrt(mean square + eps), float32 [...].
        """
        out, inverse = torch.empty_like(x, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)
        self._call(
            "rms_norm", x, x.dtype is SHORT, weight, out, dtype is SHORT, inverse, inverse.numel(), x.shape[-1], eps
        )
        return out, inverse

    def rms_norm_backward(self, grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x, in its format, and of the weight, from that of the output, `FORMATS` [..., W]."""
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        self._call(
            "rms_norm_backward", grad, grad.dtype is SHORT, x, x.dtype is SHORT, weight, inverse, grad_x, grad_weight,
            inverse.numel(), x.shape[-1],
        )  # fmt: skip
        return grad_x, grad_weight

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """gate * sigmoid(gate) * up, all of one format of `FORMATS` and one shape."""
        out = torch.empty_like(up)
        self._call("silu_mul", gate, up, out, out.dtype is SHORT, out.numel())
        return out

    def silu_mul_backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of `gate` and `up` from that of the output, of the same format and shape."""
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        self._call("silu_mul_backward", grad, gate, up, grad_gate, grad_up, up.dtype is SHORT, up.numel())
        return grad_gate, grad_up

    def apply_rotary(self, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        """As `functional.apply_rotary`, from and to any of `FORMATS`; with -sin it is the backward pass."""
        out = torch.empty_like(x, dtype=dtype)
        rows = cos.numel() // x.shape[-1]
        self._call("apply_rotary", x, x.dtype is SHORT, cos, sin, out, dtype is SHORT, rows, *x.shape[-2:])
        return out

    def attention(self, ranges: KeyRanges, q: Tensor, *keys_values: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of blocks of queries to ranges of a context, and to a few keys of each block's own.

        Args:
            ranges: what each block sees of the context.
            q: [M, L, Q, D], as all of them float32.
            keys_values: keys and values of the context, [C, G, D] each, and of the blocks, [M, S, G, D] each.

        Returns: [M, L, Q, D]; and the logsumexp of each query's scores [M, L, Q].
        """
        out, logsumexp = torch.empty_like(q), q.new_empty(q.shape[:-1])
        self._call(
            "attention", q, *keys_values, ranges.first, ranges.end, out, logsumexp, *_sizes(ranges, q, keys_values)
        )
        return out, logsumexp

    def attention_backward(
        self, grad: Tensor, out: Tensor, logsumexp: Tensor, ranges: KeyRanges, q: Tensor, *keys_values: Tensor
    ) -> list[Tensor]:
        """Gradients of queries and of all keys and values, from that of the output [M, L, Q, D]."""
        grads = [torch.empty_like(each) for each in (q, *keys_values)]
        self._call(
            "attention_backward", grad, out, logsumexp, q, *keys_values, ranges.first, ranges.end, *grads,
            *_sizes(ranges, q, keys_values),
        )  # fmt: skip
        return grads

    def nesterov_momentum(
        self, momentum: Tensor, grad: Tensor, direction: Tensor | None, keep: float, fresh: float, ahead: float
    ) -> None:
        """Momentum update in place: m = keep * m + fresh * grad; float32 [k, n], gradient of `FORMATS`.

        `direction`, `FORMATS` [k, n] or the transpose of such a tensor, becomes m + ahead * grad (Nesterov).
        """
        short, transposed = grad.dtype is SHORT, False
        to_short = direction is not None and direction.dtype is SHORT
        if direction is not None and not direction.is_contiguous():
            direction, transposed = direction.mT, True
        self._call(
            "nesterov_momentum",
            momentum,
            grad,
            short,
            direction,
            to_short,
            *momentum.shape,
            transposed,
            keep,
            fresh,
            ahead,
        )

    def polynomial(self, x: Tensor, square: Tensor, factors: Tensor) -> None:
        """Set symmetric matrices, bfloat16 [B, k, k], to a I + b x + c x^2; `factors` float32 [B, 3]."""
        self._call("polynomial", x, square, factors, *x.shape[:2])

    def apply_update(self, weight: Tensor, rounded: Tensor | None, update: Tensor, keep: float, size: float) -> None:
        """Set a float32 weight to keep * weight - size * update, and its bfloat16 copy, if there is one, to the same.

        `update` is of `FORMATS`. Torch does not see the change: version counters are the caller's.
        """
        self._call("apply_update", weight, rounded, update, update.dtype is SHORT, weight.numel(), keep, size)

    def sum_of_squares(self, x: Tensor) -> float:
        """Sum of the squares of a tensor, `FORMATS`."""
        found: float = self._call("sum_of_squares", x, x.dtype is SHORT, x.numel())
        return found

    def _call(self, name: str, *words: Tensor | float | None) -> Any:
        return getattr(self.library, f"speculators_{name}")(*map(_word, words), ctypes.c_int(torch.get_num_threads()))


def _sizes(ranges: KeyRanges, q: Tensor, keys_values: Sequence[Tensor]) -> tuple[int, ...]:
    return (*q.shape, *keys_values[0].shape[:2], keys_values[2].shape[1], ranges.is_causal)


def _word(word: Tensor | float | None) -> Any:
    if isinstance(word, Tensor):
        assert word.is_contiguous()
        return ctypes.c_void_p(word.data_ptr())
    if isinstance(word, bool):
        return ctypes.c_int(word)
    return ctypes.c_float(word) if isinstance(word, float) else ctypes.c_int64(word) if word is not None else None


def kernels(*tensors: Tensor) -> Kernels | None:
    """The kernels, if all these tensors are of `FORMATS` on a CPU and the kernels compile; else None."""
    fit = all(tensor.device.type == "cpu" and tensor.dtype in FORMATS for tensor in tensors)
    found = _found() if fit else ""
    return found if isinstance(found, Kernels) else None


def missing() -> str:
    """Why there are no kernels; empty if there are."""
    found = _found()
    return "" if isinstance(found, Kernels) else found


@functools.cache
def _found() -> Kernels | str:
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH} is 0"
    try:
        _share_threads()
        return Kernels(ctypes.CDLL(str(_library())))
    except subprocess.CalledProcessError as error:
        return f"{error.cmd[0]} ended with {error.returncode}: {(error.stderr or '').strip()[-500:]}"
    except OSError as error:
        return str(error)


def _library() -> Path:
    """Path of the compiled kernels: of this source, by this compiler, for this machine."""
    compiler = os.environ.get("CXX", "c++")
    flags = FLAGS + (WIDE if platform.machine() in ("x86_64", "AMD64") else [])
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    machine = re.findall(r"^(?:model name|flags|Features)\s*:.*$", _read("/proc/cpuinfo"), re.MULTILINE)
    texts = [path.read_text() for path in (HEADER, *SOURCES)]
    made_of = "\0".join([*texts, *flags, version, platform.machine(), *sorted(set(machine))])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "speculators-native"
    library = cache / f"{hashlib.sha256(made_of.encode()).hexdigest()[:20]}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            compiled, units = Path(scratch) / "compiled.so", [str(Path(scratch) / f"{path.stem}.o") for path in SOURCES]
            steps = [[*flags, "-c", str(path), "-o", unit] for path, unit in zip(SOURCES, units, strict=True)]
            # Linked without OpenMP: its functions are those of the library that torch has loaded (`_share_threads`).
            for step in [*steps, ["-shared", *units, "-o", str(compiled)]]:
                subprocess.run([compiler, *step], capture_output=True, text=True, check=True)
            compiled.replace(library)  # whole or not at all: another process may be at it too
    return library


def _share_threads() -> None:
    """Let the kernels find the OpenMP library that torch has loaded: two would wait for each other to sleep."""
    for path in sorted(set(re.findall(r"\S*/lib(?:gomp|iomp5|omp)\b\S*", _read("/proc/self/maps")))):
        ctypes.CDLL(path, ctypes.RTLD_GLOBAL)


def _read(path: str) -> str:
    """A file of the kernel's, which others than Linux do not have."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
