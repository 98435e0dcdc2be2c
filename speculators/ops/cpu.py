"""Loops in C++ for training on a CPU, compiled for the machine when they are first needed.

What follows a product is small work on many numbers: torch does each operation of it by itself, and goes through
memory for every one. Here a row of logits becomes a loss and a slope while a core's own cache holds it, which takes a
tenth of the time (docs/log.md). Whoever calls has the same in torch's operations, for a GPU and for machines without a
compiler; results of the two differ by rounding.

The compiler is `$CXX` or `c++`, and what it makes is kept in the user's cache. `SPECULATORS_NATIVE=0` does without.
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
"""On x86, whose compilers use half of what there is unless told."""
SHORT = torch.bfloat16
FORMATS = (torch.float32, SHORT)
LOSSES = ({Loss.kl: 1.0}, {Loss.ce: 1.0})
ROUNDED = "speculators_rounded"
"""Attribute of a weight."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What blocks of queries see of their context."""

    first: Tensor
    """The first place, int64 [M]."""
    end: Tensor
    """The first place behind it, int64 [M]."""
    causal: bool = False
    """Whether the queries are those of a block's last slots, and see none of its own keys after their own."""


@dataclass(slots=True)
class Rounded:
    """A weight in another format."""

    tensor: Tensor
    version: int
    """Of the weight that it was made of: every change raises the weight's."""


@torch.no_grad()
def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in a format; made once for every value of the weight, in the same memory, which is there already.

    Whoever changes the weight where torch does not see it has to raise its version.
    """
    if weight.dtype is dtype:
        return weight.detach()
    kept: Rounded | None = getattr(weight, ROUNDED, None)
    if kept is None or kept.tensor.dtype is not dtype:
        kept = Rounded(weight.detach().to(dtype), weight._version)
        setattr(weight, ROUNDED, kept)
    elif kept.version != weight._version:
        kept.tensor.copy_(weight)
        kept.version = weight._version
    return kept.tensor


class Kernels:
    """The loops; all tensors are contiguous, in a CPU's memory."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.speculators_squares.restype = ctypes.c_double

    def losses(
        self, kind: Loss, z: Tensor, wanted: Tensor, local: Tensor, weight: Tensor | None, slopes: bool
    ) -> tuple[Tensor, Tensor]:
        """The loss of each prediction, and whether its largest logit is where the target's is.

        Args:
            kind: one of `LOSSES`.
            z: the draft's logits [n, V], `FORMATS`; with `slopes` the losses' slopes, times `weight`, afterwards.
            wanted: the target's logits [u, V], `FORMATS`.
            local: which of them each prediction is against, int64 [n]; equal ones are best neighbours.
            weight: float32 [n]; 1 if None.
            slopes: whether they are wanted.

        Returns: float32 [n]; bool [n], of equal logits the first one counts.
        """
        loss, correct = torch.empty(len(z)), torch.empty(len(z), dtype=torch.bool)
        self._call(
            "losses", kind is Loss.ce, z, z.dtype is SHORT, wanted, wanted.dtype is SHORT, local, weight, *z.shape,
            slopes, loss, correct,
        )  # fmt: skip
        return loss, correct

    def norm(self, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rows of a root mean square of 1 (and `eps`), times a weight.

        Args:
            x: `FORMATS` [..., W].
            weight: float32 [W].
            eps: added to the mean of the squares.
            dtype: of the result, of `FORMATS`.

        Returns: of x's shape; and what each row was multiplied by, float32 [...].
        """
        out, inverse = torch.empty_like(x, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)
        self._call("norm", x, x.dtype is SHORT, weight, out, dtype is SHORT, inverse, inverse.numel(), x.shape[-1], eps)
        return out, inverse

    def norm_slopes(self, slope: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """Of a loss with the slope `slope`, `FORMATS` [..., W]: those of x, in its format, and of the weight."""
        of_x, of_weight = torch.empty_like(x), torch.empty_like(weight)
        self._call(
            "norm_slopes", slope, slope.dtype is SHORT, x, x.dtype is SHORT, weight, inverse, of_x, of_weight,
            inverse.numel(), x.shape[-1],
        )  # fmt: skip
        return of_x, of_weight

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """gate * sigmoid(gate) * up, all of one format of `FORMATS` and one shape."""
        out = torch.empty_like(up)
        self._call("gated", gate, up, out, out.dtype is SHORT, out.numel())
        return out

    def gated_slopes(self, slope: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Of a loss with the slope `slope`, of the same format and shape: those of `gate` and `up`."""
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        self._call("gated_slopes", slope, gate, up, of_gate, of_up, up.dtype is SHORT, up.numel())
        return of_gate, of_up

    def rotate(self, x: Tensor, cosine: Tensor, sine: Tensor, dtype: torch.dtype) -> Tensor:
        """Turn the halves of heads, `FORMATS` [..., heads, D], against each other; gives `dtype`, of `FORMATS`.

        Cosine and sine are float32 [..., 1, D], and their halves equal: with the sine's other sign it is turned back.
        """
        out = torch.empty_like(x, dtype=dtype)
        rows = cosine.numel() // x.shape[-1]
        self._call("rotate", x, x.dtype is SHORT, cosine, sine, out, dtype is SHORT, rows, *x.shape[-2:])
        return out

    def attend(self, seen: Seen, q: Tensor, *keys_values: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of blocks of queries to ranges of a context, and to a few keys of each block's own.

        Args:
            seen: what of them.
            q: [M, L, Q, D], as all of them float32.
            keys_values: keys and values of the context, [C, G, D] each, and of the blocks, [M, S, G, D] each.

        Returns: [M, L, Q, D]; and the logarithms of what the shares were divided by [M, L, Q].
        """
        out, logs = torch.empty_like(q), q.new_empty(q.shape[:-1])
        self._call("attend", q, *keys_values, seen.first, seen.end, out, logs, *_sizes(seen, q, keys_values))
        return out, logs

    def attend_slopes(
        self, slope: Tensor, out: Tensor, logs: Tensor, seen: Seen, q: Tensor, *keys_values: Tensor
    ) -> list[Tensor]:
        """Of a loss with the slope `slope` [M, L, Q, D], those of the queries, and of all keys and values."""
        slopes = [torch.empty_like(each) for each in (q, *keys_values)]
        self._call(
            "attend_slopes", slope, out, logs, q, *keys_values, seen.first, seen.end, *slopes,
            *_sizes(seen, q, keys_values),
        )  # fmt: skip
        return slopes

    def momentum(
        self, held: Tensor, gradient: Tensor, asked: Tensor | None, keep: float, fresh: float, ahead: float
    ) -> None:
        """Let a momentum, float32 [k, n], become `keep` of itself and `fresh` of the gradient, `FORMATS` [k, n].

        `asked`, `FORMATS` [k, n], which may lie there transposed, becomes the same and `ahead` of the gradient again.
        """
        short, turned = gradient.dtype is SHORT, False
        to_short = asked is not None and asked.dtype is SHORT
        if asked is not None and not asked.is_contiguous():
            asked, turned = asked.mT, True
        self._call("momentum", held, gradient, short, asked, to_short, *held.shape, turned, keep, fresh, ahead)

    def polynomial(self, x: Tensor, square: Tensor, factors: Tensor) -> None:
        """Let symmetric matrices, bfloat16 [B, k, k], become a + b x + c x^2; `factors` float32 [B, 3]."""
        self._call("polynomial", x, square, factors, *x.shape[:2])

    def move(self, weight: Tensor, update: Tensor, keep: float, size: float) -> None:
        """Let a float32 weight become `keep` of itself less `size` of an update, `FORMATS`; `rounded` follows."""
        kept: Rounded | None = getattr(weight, ROUNDED, None)
        follows = kept is not None and kept.tensor.dtype is SHORT and kept.version == weight._version
        short = kept.tensor if kept is not None and follows else None
        self._call("move", weight, short, update, update.dtype is SHORT, weight.numel(), keep, size)
        torch.autograd.graph.increment_version(weight)
        if kept is not None and follows:
            kept.version = weight._version

    def squares(self, x: Tensor) -> float:
        """The sum of the squares of a tensor, `FORMATS`."""
        found: float = self._call("squares", x, x.dtype is SHORT, x.numel())
        return found

    def _call(self, name: str, *words: Tensor | float | None) -> Any:
        return getattr(self.library, f"speculators_{name}")(*map(_word, words), ctypes.c_int(torch.get_num_threads()))


def _sizes(seen: Seen, q: Tensor, keys_values: Sequence[Tensor]) -> tuple[int, ...]:
    return (*q.shape, *keys_values[0].shape[:2], keys_values[2].shape[1], seen.causal)


def _word(word: Tensor | float | None) -> Any:
    if isinstance(word, Tensor):
        assert word.is_contiguous()
        return ctypes.c_void_p(word.data_ptr())
    if isinstance(word, bool):
        return ctypes.c_int(word)
    return ctypes.c_float(word) if isinstance(word, float) else ctypes.c_int64(word) if word is not None else None


def kernels(*tensors: Tensor) -> Kernels | None:
    """The loops, or None where they are not for these tensors, of `FORMATS` on a CPU, or nothing compiles them."""
    fit = all(tensor.device.type == "cpu" and tensor.dtype in FORMATS for tensor in tensors)
    found = _found() if fit else ""
    return found if isinstance(found, Kernels) else None


def missing() -> str:
    """Why there are no loops; empty if there are."""
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
    """The compiled loops: of this source, by this compiler, for this machine."""
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
            made, units = Path(scratch) / "made.so", [str(Path(scratch) / f"{path.stem}.o") for path in SOURCES]
            steps = [[*flags, "-c", str(path), "-o", unit] for path, unit in zip(SOURCES, units, strict=True)]
            # Linked without OpenMP: its functions are those of the library that torch has loaded (`_share_threads`).
            for step in [*steps, ["-shared", *units, "-o", str(made)]]:
                subprocess.run([compiler, *step], capture_output=True, text=True, check=True)
            made.replace(library)  # whole or not at all: another process may be at it too
    return library


def _share_threads() -> None:
    """Let the loops find the OpenMP library that torch has loaded: two would wait for each other's threads to sleep."""
    for path in sorted(set(re.findall(r"\S*/lib(?:gomp|iomp5|omp)\b\S*", _read("/proc/self/maps")))):
        ctypes.CDLL(path, ctypes.RTLD_GLOBAL)


def _read(path: str) -> str:
    """A file of the kernel's, which others than Linux do not have."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
