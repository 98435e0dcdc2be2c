"""The C++ kernels: ties, NaN, threads, and how they are compiled; `test_ops` holds their results to the reference."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from speculators.ops import cpu

BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture
def kernels() -> cpu.Kernels:
    loaded = cpu.kernels()
    return loaded if loaded is not None else pytest.skip(cpu.missing())


def drawn(*shape: int, dtype: torch.dtype = F32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).to(dtype)


def test_of_equal_logits_the_first_one_counts_on_both_sides(kernels: cpu.Kernels) -> None:
    logits, target_logits = torch.zeros(3, 600), torch.zeros(3, 600)
    logits[0, [300, 400]] = target_logits[0, [300, 400]] = 1.0
    logits[1, [300, 400]], target_logits[1, 400] = 1.0, 1.0
    logits[2, 400], target_logits[2, [300, 400]] = 1.0, 1.0
    correct = kernels.losses("ce", logits, target_logits, torch.arange(3), None, False)[1]
    assert correct.tolist() == [True, False, False]


def test_logits_stay_where_no_gradient_is_requested_and_nan_shows_in_the_loss(kernels: cpu.Kernels) -> None:
    logits, target_logits = drawn(4, 50), drawn(4, 50)
    before = logits.clone()
    kernels.losses("kl", logits, target_logits, torch.arange(4), None, False)
    assert torch.equal(logits, before)
    logits[1, 7], target_logits[2, 9] = float("nan"), float("nan")
    for name in ("kl", "ce"):
        loss, _ = kernels.losses(name, logits.clone(), target_logits, torch.arange(4), None, True)
        assert loss.isfinite().tolist() == [True, False, False, True]


@pytest.mark.parametrize("shape", [(5, 7), (64, 96), (70, 33), (1, 40), (40, 1)])
@pytest.mark.parametrize("grad_dtype", [BF16, F32])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_a_direction_may_be_transposed_of_either_format_or_not_requested(
    kernels: cpu.Kernels, shape: tuple[int, int], grad_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    before, grad = drawn(*shape), drawn(*shape, dtype=grad_dtype, scale=3.0)
    expected = before * 0.9 + grad.float() * 0.2
    for direction in (None, torch.empty(shape, dtype=dtype), torch.empty(shape[::-1], dtype=dtype).mT):
        momentum = before.clone()
        kernels.nesterov_momentum(momentum, grad, direction, 0.9, 0.2, 0.3)
        torch.testing.assert_close(momentum, expected, atol=1e-6, rtol=1e-6)
        if direction is not None:
            lookahead = expected + grad.float() * 0.3
            torch.testing.assert_close(direction.float(), lookahead, atol=1e-6, rtol=1e-6 if dtype is F32 else 2**-8)


def test_the_number_of_threads_does_not_change_a_bit(kernels: cpu.Kernels) -> None:
    def results() -> list[Tensor]:
        logits, direction, momentum = drawn(50, 333, dtype=BF16), torch.empty(90, 70, dtype=BF16).mT, drawn(70, 90)
        loss, _ = kernels.losses("kl", logits, drawn(17, 333), torch.arange(50) // 3, None, True)
        kernels.nesterov_momentum(momentum, drawn(70, 90, scale=2.0), direction, 0.95, 0.05, 0.05)
        x, grad, weight = drawn(77, 40), drawn(77, 40, dtype=BF16), drawn(40)
        grads = kernels.rms_norm_backward(grad, x, weight, kernels.rms_norm(x, weight, 1e-6, BF16)[1])
        squares = torch.tensor(kernels.sum_of_squares(momentum), dtype=torch.float64)
        return [loss, logits, direction, momentum, *grads, squares]

    threads_before, by_threads = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            by_threads.append(results())
    finally:
        torch.set_num_threads(threads_before)
    for other in by_threads[1:]:
        assert all(torch.equal(one, two) for one, two in zip(by_threads[0], other, strict=True))


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing is compiled or loaded yet, for this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(cpu.SWITCH, raising=False)
    cpu._load.cache_clear()
    yield tmp_path
    cpu._load.cache_clear()


def test_they_are_compiled_once_and_kept(kernels: cpu.Kernels, empty_cache: Path) -> None:
    assert cpu.kernels() is not None
    assert cpu.missing() == ""
    (library,) = (empty_cache / "speculators-native").iterdir()
    compiled_at = library.stat().st_mtime_ns
    cpu._load.cache_clear()
    assert cpu.kernels() is not None
    assert library.stat().st_mtime_ns == compiled_at


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("CXX", "/nowhere/c++", "No such file or directory: '/nowhere/c++'"),
        ("CXX", "false", "false ended with 1"),
        ("CXX", "false --option", "false ended with 1"),
        ("CXX", "'c++", "No closing quotation"),
        ("SPECULATORS_NATIVE", "0", "SPECULATORS_NATIVE is 0"),
    ],
)
def test_without_a_compiler_or_if_switched_off_there_are_none(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, reason: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert cpu.kernels() is None
    assert reason in cpu.missing()


def test_without_a_home_directory_there_are_none(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert cpu.kernels() is None
    assert cpu.missing() == "Could not determine home directory."


def test_they_are_for_tensors_on_a_cpu_in_supported_formats(kernels: cpu.Kernels) -> None:
    assert cpu.kernels(torch.empty(1, dtype=torch.float16)) is None
    assert cpu.kernels(torch.empty(1, device="meta")) is None
    assert cpu.kernels(torch.empty(1)) is kernels


def test_a_tensor_of_another_shape_format_or_layout_is_refused_and_not_read_past_its_end(kernels: cpu.Kernels) -> None:
    x, short, weight = drawn(6, 4), drawn(6, 3), drawn(4)
    rows, q, context, block = torch.arange(6), drawn(2, 3, 4, 8), drawn(5, 2, 8), drawn(2, 3, 2, 8)
    ranges, few = cpu.KeyRanges(torch.zeros(2).long(), torch.ones(2).long()), cpu.KeyRanges(rows[:1], rows[:1])
    square = drawn(2, 4, 4, dtype=BF16)
    wrong = [
        lambda: kernels.losses("kl", x, drawn(6, 3), rows, None, True),
        lambda: kernels.losses("kl", x, x, rows[:5], None, True),
        lambda: kernels.losses("kl", x, x, rows.int(), None, True),
        lambda: kernels.losses("kl", x, x, rows, drawn(5), True),
        lambda: kernels.losses("kl", x.double(), x, rows, None, True),
        lambda: kernels.rms_norm(x, weight[:3], 1e-6, F32),
        lambda: kernels.rms_norm(x, weight.to(BF16), 1e-6, F32),
        lambda: kernels.rms_norm(drawn(4, 6).mT, weight, 1e-6, F32),
        lambda: kernels.rms_norm_backward(short, x, weight, drawn(6)),
        lambda: kernels.rms_norm_backward(x, x, weight, drawn(5)),
        lambda: kernels.silu_mul(short, x),
        lambda: kernels.silu_mul(x.to(BF16), x),
        lambda: kernels.silu_mul_backward(short, x, x),
        lambda: kernels.apply_rotary(drawn(6, 2, 4), drawn(5, 1, 4), drawn(5, 1, 4), F32),
        lambda: kernels.apply_rotary(drawn(6, 2, 4), drawn(6, 1, 4), drawn(6, 1, 2), F32),
        lambda: kernels.attention(ranges, q, context[:, :, :4], context, block, block),
        lambda: kernels.attention(ranges, q, context, context[:4], block, block),
        lambda: kernels.attention(ranges, q, context, context, block, block[:, :2]),
        lambda: kernels.attention(few, q, context, context, block, block),
        lambda: kernels.attention(ranges, q.to(BF16), context, context, block, block),
        lambda: kernels.attention(ranges, q[:, :, :3].contiguous(), context, context, block, block),
        lambda: kernels.attention_backward(q, q, q[..., 1], ranges, q, context, context, block, block),
        lambda: kernels.nesterov_momentum(x, short, None, 0.9, 0.1, 0.1),
        lambda: kernels.nesterov_momentum(x, x, short, 0.9, 0.1, 0.1),
        lambda: kernels.nesterov_momentum(x, x, drawn(6, 4).mT, 0.9, 0.1, 0.1),
        lambda: kernels.polynomial(square, square, drawn(1, 3)),
        lambda: kernels.polynomial(square[:, :, :3].contiguous(), square, drawn(2, 3)),
        lambda: kernels.apply_update(x, None, short, 1.0, 0.1),
        lambda: kernels.apply_update(x, short.to(BF16), x, 1.0, 0.1),
        lambda: kernels.sum_of_squares(x.int()),
    ]
    for call in wrong:
        with pytest.raises(ValueError, match=r"must be contiguous cpu torch\.|query heads on"):
            call()
    with pytest.raises(ValueError, match=r"rms_norm: weight is cpu torch\.float32 \[3\], must be contiguous cpu"):
        kernels.rms_norm(x, weight[:3], 1e-6, F32)
