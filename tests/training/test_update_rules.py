"""Both optimisers and every schedule against their formulas, written out here in float64 with numbers of their own.

Nothing is imported from the optimisers but their door: a constant that moves there disagrees with the one here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainings import job_of, metrics

from speculators.config.choices import Dtype, LrSchedule, Optimizer
from speculators.config.schema import Train
from speculators.stages import train
from speculators.training.optim import Optimizers, rate

BETA_1, BETA_2, EPS = 0.9, 0.95, 1e-8
MOMENTUM = 0.95
LR, ADAMW_LR, WEIGHT_DECAY = 0.02, 0.003, 0.1
FACTORS = [0.5, 1.0, 0.25]
"""Shares of the peak learning rate in the steps that are taken."""
CLIPPED = [1.0, 0.125, 0.5]
"""What the gradients of those steps are multiplied by."""
SHAPES = {"wide": (4, 6), "tall": (7, 3), "square": (5, 5), "norm": (6,), "lm_head": (6, 4)}
MUONS = ("wide", "tall", "square")
SCALE = 0.8490016030350571
POLES = {7.853246321038987e-05: 0.02035097971791578, 0.01920639484477456: 0.28000543285858204}
"""Zolotarev's function of two pairs of poles for [0.005, 1]: f(x) = SCALE * x * (1 + sum(weight / (x^2 + pole)))."""
QUINTICS = [
    (8.26322276051256, -23.504199369861908, 16.754055389848872),
    (4.03699987276044, -2.8876570662791146, 0.5215665376942002),
    (3.6701282810834766, -2.6409937093278533, 0.49533509848619456),
    (2.793181226775115, -2.014977622886023, 0.42978968487580005),
]
"""a x + b x^3 + c x^5, one after the other: what takes Zolotarev's place in bfloat16."""


def options(optimizer: Optimizer, **others: Any) -> Train:
    """What is trained with; two learning rates only where there are two optimisers."""
    rates = {"lr": ADAMW_LR, "muon_lr": LR} if optimizer is Optimizer.muon else {"lr": ADAMW_LR}
    chosen = {"optimizer": optimizer, "weight_decay": WEIGHT_DECAY, "precision": Dtype.float32, **rates, **others}
    return Train(**chosen)  # type: ignore[arg-type]


class Net(nn.Module):
    """Parameters of `SHAPES`, and gradients for them that are drawn from a seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        for name, shape in SHAPES.items():
            owner: nn.Module = self
            if name == "lm_head":  # the vocabulary's matrices are never Muon's
                owner = self.lm_head = nn.Module()
            owner.register_parameter("weight" if owner is not self else name, nn.Parameter(torch.empty(shape)))
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=draw)

    def named(self) -> dict[str, nn.Parameter]:
        return {name.removesuffix(".weight"): p for name, p in self.named_parameters()}


def gradients(step: int) -> dict[str, Tensor]:
    """Of every parameter in a step; a third of the numbers are as small as AdamW's eps."""
    draw = torch.Generator().manual_seed(100 + step)
    grads = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    for name in ("norm", "lm_head"):
        grads[name].view(-1)[::3] *= 1e-8
    return grads


def trained(train: Train) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The parameters as they began, and after every step, in float64."""
    net = Net(0)
    named = net.named()
    first = {name: p.detach().double() for name, p in named.items()}
    optimizers, after = Optimizers(net, train), []
    for step, (factor, clipped) in enumerate(zip(FACTORS, CLIPPED, strict=True)):
        for name, gradient in gradients(step).items():
            named[name].grad = gradient.clone()
        optimizers.step(factor, clipped)
        assert all(p.grad is None for p in named.values())
        after.append({name: p.detach().double() for name, p in named.items()})
    return first, after


def adamw(p: Tensor, name: str) -> list[Tensor]:
    """Decoupled weight decay, of matrices only; moments whose zeros at the beginning are divided out."""
    m, v, after = torch.zeros_like(p), torch.zeros_like(p), []
    for step, (factor, clipped) in enumerate(zip(FACTORS, CLIPPED, strict=True)):
        g, lr = gradients(step)[name].double() * clipped, ADAMW_LR * factor
        m = BETA_1 * m + (1 - BETA_1) * g
        v = BETA_2 * v + (1 - BETA_2) * g * g
        m_hat, v_hat = m / (1 - BETA_1 ** (step + 1)), v / (1 - BETA_2 ** (step + 1))
        p = p - (lr * WEIGHT_DECAY * p if p.ndim == 2 else 0.0) - lr * m_hat / (v_hat.sqrt() + EPS)
        after.append(p)
    return after


def zolotarev(x: Tensor) -> Tensor:
    return SCALE * x * (1 + sum(weight / (x * x + pole) for pole, weight in POLES.items()))


def quintics(x: Tensor) -> Tensor:
    for a, b, c in QUINTICS:
        x = a * x + b * x**3 + c * x**5
    return x


def orthogonal(matrix: Tensor, function: Callable[[Tensor], Tensor], power: int, rows: int = 0) -> Tensor:
    """U f(S) V', S divided by its `power`-norm; in groups of `rows` rows of the shorter side, if any."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.mT, function, power, rows).mT
    parts = []
    for part in matrix.split(rows or len(matrix)):
        u, s, v = torch.linalg.svd(part, full_matrices=False)
        parts.append(u @ torch.diag(function(s / (s**power).sum() ** (1 / power))) @ v)
    return torch.cat(parts)


def muon(p: Tensor, name: str, function: Callable[[Tensor], Tensor], power: int, rows: int = 0) -> list[Tensor]:
    """Nesterov's momentum, made orthogonal, as large as AdamW's updates are: 0.2 sqrt(longer side)."""
    m, after = torch.zeros_like(p), []
    for step, (factor, clipped) in enumerate(zip(FACTORS, CLIPPED, strict=True)):
        g, lr = gradients(step)[name].double() * clipped, LR * factor
        m = MOMENTUM * m + (1 - MOMENTUM) * g
        update = orthogonal(MOMENTUM * m + (1 - MOMENTUM) * g, function, power, rows)
        p = p - lr * WEIGHT_DECAY * p - lr * 0.2 * math.sqrt(max(p.shape)) * update
        after.append(p)
    return after


@pytest.mark.parametrize("optimizer", Optimizer)
def test_adamw_follows_its_formula(optimizer: Optimizer) -> None:
    first, after = trained(options(optimizer))
    for name in SHAPES if optimizer is Optimizer.adamw else SHAPES.keys() - MUONS:
        for actual, expected in zip(after, adamw(first[name], name), strict=True):
            torch.testing.assert_close(actual[name], expected, rtol=0, atol=4e-7)


def test_adamw_without_muon_has_the_one_learning_rate() -> None:
    net = Net(0)
    optimizers = Optimizers(net, Train(optimizer=Optimizer.adamw, lr=0.5, weight_decay=0.0))
    before = net.norm.detach().clone()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizers.step(1.0)
    torch.testing.assert_close(net.norm.detach(), before - 0.5)  # a first step is as long as the learning rate


@pytest.mark.parametrize("rows", [0, 2])
def test_muon_follows_its_formula(rows: int) -> None:
    first, after = trained(options(Optimizer.muon, muon_block=rows))
    for name in MUONS:
        for actual, expected in zip(after, muon(first[name], name, zolotarev, 4, rows), strict=True):
            torch.testing.assert_close(actual[name], expected, rtol=0, atol=2e-6)


def test_muon_in_bfloat16_follows_its_formula_but_for_rounding() -> None:
    first, after = trained(options(Optimizer.muon, precision=Dtype.bfloat16))
    for name in MUONS:
        expected = muon(first[name], name, quintics, 8)
        moved = (expected[-1] - first[name]).norm()
        assert float((after[-1][name] - expected[-1]).norm()) < 0.1 * float(moved)


def test_the_numbers_of_both_are_options(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BETA_1": 0.8, "BETA_2": 0.99, "EPS": 1e-3, "MOMENTUM": 0.7}.items():
        monkeypatch.setitem(globals(), name, value)
    others = {"adamw_betas": [0.8, 0.99], "adamw_eps": 1e-3, "muon_momentum": 0.7, "muon_weight_decay": 0.3}
    first, after = trained(options(Optimizer.muon, **others))
    for name in SHAPES.keys() - MUONS:
        torch.testing.assert_close(after[-1][name], adamw(first[name], name)[-1], rtol=0, atol=4e-7)
    monkeypatch.setitem(globals(), "WEIGHT_DECAY", 0.3)
    for name in MUONS:
        expected = muon(first[name], name, zolotarev, 4)[-1]
        torch.testing.assert_close(after[-1][name], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("optimizer", Optimizer)
def test_either_optimizer_trains_in_bfloat16(world: Path, tmp_path: Path, optimizer: Optimizer) -> None:
    job = job_of(world, tmp_path, optimizer=optimizer, precision=Dtype.bfloat16, max_steps=3)
    train.main(job)
    assert [line["step"] for line in metrics(job) if "lr" in line] == [1, 2, 3]


def rising(step: int, total: int, warmup: float) -> tuple[int, float]:
    """Steps of the warm-up, and its share of the peak in this one."""
    steps = max(1, round(warmup * total))
    return steps, (step + 1) / steps


FORMULAS: dict[LrSchedule, Callable[[int, int, int, float], float]] = {
    LrSchedule.constant: lambda step, total, rise, decay: 1.0,
    LrSchedule.linear: lambda step, total, rise, decay: 1.0 - (step - rise) / (total - rise),
    LrSchedule.cosine: lambda step, total, rise, decay: (
        (1.0 + math.cos(math.pi * (step - rise) / (total - rise))) / 2.0
    ),
    LrSchedule.wsd: lambda step, total, rise, decay: min(1.0, (total - step) / round(decay * total)),
}


@pytest.mark.parametrize("schedule", LrSchedule)
@pytest.mark.parametrize(("total", "warmup", "decay"), [(100, 0.1, 0.2), (40, 0.5, 0.5), (30, 0.0, 0.1), (7, 0.3, 1.0)])
def test_a_schedule_is_its_formula(schedule: LrSchedule, total: int, warmup: float, decay: float) -> None:
    for step in range(total):
        rise, expected = rising(step, total, warmup)
        if step >= rise:
            expected = FORMULAS[schedule](step, total, rise, decay)
        assert rate(step, total, warmup, schedule, decay) == pytest.approx(expected, abs=1e-12), step


@pytest.mark.parametrize("schedule", LrSchedule)
def test_a_training_follows_its_schedule(world: Path, tmp_path: Path, schedule: LrSchedule) -> None:
    chosen = {"schedule": schedule, "warmup_ratio": 0.3, "decay_ratio": 0.5, "lr": 0.01, "max_steps": 10, "epochs": 10}
    job = job_of(world, tmp_path, **chosen)
    train.main(job)
    for step, line in enumerate(line for line in metrics(job) if "lr" in line):
        rise, expected = rising(step, 10, 0.3)
        if step >= rise:
            expected = FORMULAS[schedule](step, 10, rise, 0.5)
        assert line["lr"] == pytest.approx(0.01 * expected)
