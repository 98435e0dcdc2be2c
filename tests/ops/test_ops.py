"""Every implementation of every operation against `ops.reference` in float64, results and gradients.

Tolerances are relative to the largest expected value and follow from the format of the compared tensor, or of the
products behind it if that is shorter:

- float32: 8e-6, 64 roundings of 2^-23; sums have at most a few hundred terms, in lanes or chunks.
- bfloat16: 2^-6, four roundings of 2^-8: torch rounds between its operations, and to the input's format after them.
- the fused loss in bfloat16: 5 % of the norm; errors of 2^-8 go through norm, head, softmax and back.
- Muon's weights: 1e-4 in float32, because small singular values are multiplied by up to 240, and errors with them; 20 %
  of the norm in bfloat16, after twelve products. A wrong sign, factor or coefficient is off by much more.

Inputs of the bfloat16 cases are numbers that bfloat16 holds exactly. `flex` has no gradients on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from speculators.config.algorithms import Loss
from speculators.ops import cpu, divergences, functional, gpu, muon, reference, weights
from speculators.ops.attention import KeyValues, anchored_attention, causal_attention
from speculators.ops.distillation import TargetHead, distillation_loss, hidden_state_loss
from speculators.ops.masks import anchor_mask, causal_mask, context_positions

F32, BF16 = torch.float32, torch.bfloat16
TOLERANCE = {F32: 8e-6, BF16: 2**-6}
EPS = 0.01
"""Of norms: a mean square of inputs is about as large, so that leaving it out shows."""
DEVICE = "cpu"


class Case(NamedTuple):
    """An operation on certain inputs."""

    inputs: Callable[[], list[Tensor]]
    """Differentiable inputs, float32 or bfloat16."""
    run: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    """The public function: inputs on the device -> results."""
    expected: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    """The reference: inputs in float64 -> results."""
    tolerance: float = 0.0
    """Of the largest value, if it is more than that of the compared tensor's format."""
    norm_tolerance: float = 0.0
    """If not 0, tensors are compared by norm instead."""
    exact_results: int = 0
    """Number of last results to which the format's tolerance applies."""
    differentiable: bool = True


def drawn(*shape: int, dtype: torch.dtype = F32, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Normal numbers that bfloat16 holds exactly."""
    draw = torch.Generator().manual_seed(sum(shape) + seed)
    return (torch.randn(shape, generator=draw) * scale).bfloat16().to(dtype)


def at(tensor: Tensor) -> Tensor:
    """The tensor on the device of the test."""
    return tensor.to(DEVICE)


def rms_norm(dtype: torch.dtype, feeds_matmul: bool = False) -> Case:
    def run(x: Sequence[Tensor]) -> list[Tensor]:
        with torch.autocast(DEVICE, BF16, enabled=feeds_matmul):
            return [functional.rms_norm(x[0], x[1], EPS, feeds_matmul)]

    return Case(
        lambda: [drawn(7, 5, 33, dtype=dtype, scale=0.1), drawn(33)],
        run,
        lambda x: [reference.rms_norm(x[0], x[1], EPS)],
    )


def rotary(dtype: torch.dtype) -> Case:
    angles = torch.cat([drawn(9, 1, 12, seed=1)] * 2, -1)
    cos, sin = angles.cos(), angles.sin()
    return Case(
        lambda: [drawn(9, 3, 24, dtype=dtype)],
        lambda x: [functional.apply_rotary(x[0], at(cos), at(sin))],
        lambda x: [reference.apply_rotary(x[0], cos.double(), sin.double())],
    )


def silu_mul(dtype: torch.dtype) -> Case:
    return Case(
        lambda: [drawn(50, 33, dtype=dtype, scale=5.0), drawn(50, 33, dtype=dtype, seed=1)],
        lambda x: [functional.silu_mul(x[0], x[1])],
        lambda x: [reference.silu_mul(x[0], x[1])],
    )


def linear(dtype: torch.dtype) -> Case:
    def run(x: Sequence[Tensor]) -> list[Tensor]:
        with torch.autocast(DEVICE, BF16, enabled=dtype is BF16):
            return [functional.linear(x[0], x[1])]

    return Case(
        lambda: [drawn(3, 7, 40), drawn(30, 40)], run, lambda x: [reference.linear(x[0], x[1])], TOLERANCE[dtype]
    )


DOCUMENTS = {"short": [7, 1, 12], "longer than a chunk": [300, 4, 270]}


def spans(lengths: list[int]) -> list[tuple[int, int]]:
    """(first token, length) of documents."""
    return [(sum(lengths[:i]), length) for i, length in enumerate(lengths)]


def causal(dtype: torch.dtype, lengths: list[int], later: int, width: int, flex: bool) -> Case:
    documents, total = spans(lengths), sum(lengths)
    positions = (torch.rand(total, generator=torch.Generator().manual_seed(1)) < 0.7).nonzero()[:, 0]
    count = len(positions)

    def inputs() -> list[Tensor]:
        steps = [(total, 0), *((count, step) for step in range(1, later + 1))]
        pairs = [
            drawn(n, 2, width, dtype=kind, seed=10 * step + i)
            for n, step in steps
            for i, kind in ((1, F32), (2, dtype))
        ]
        return [drawn(count, 4, width), *pairs]  # queries and keys are rotated, which makes them float32

    def run(x: Sequence[Tensor]) -> list[Tensor]:
        mask = causal_mask(documents, at(positions))
        if flex:
            return [gpu.flex_causal(x[0], list(x[1::2]), list(x[2::2]), mask)]
        later_steps = list(zip(x[3::2], x[4::2], strict=True))
        return [causal_attention(x[0], KeyValues(x[1], x[2], later_steps), mask)]

    def expected(x: Sequence[Tensor]) -> list[Tensor]:
        return [reference.causal_attention(x[0], list(zip(x[1::2], x[2::2], strict=True)), documents, positions)]

    return Case(inputs, run, expected, differentiable=not flex)


def anchored(
    dtype: torch.dtype, lengths: list[int], length: int, is_causal: bool, window: int | None, flex: bool
) -> Case:
    documents, total, slots = spans(lengths), sum(lengths), 4
    anchors = (torch.rand(total, generator=torch.Generator().manual_seed(1)) < 0.6).nonzero()[:, 0]
    anchors = torch.cat([anchors.new_zeros(1), anchors]).unique()  # the first sees nothing but its block
    count = len(anchors)

    def inputs() -> list[Tensor]:
        queries = drawn(count, length, 4, 8)
        keys, values = (
            [drawn(*shape, 2, 8, dtype=kind, seed=i) for shape in ((total,), (count, slots))]
            for i, kind in ((1, F32), (2, dtype))
        )
        return [queries, keys[0], values[0], keys[1], values[1]]

    def run(x: Sequence[Tensor]) -> list[Tensor]:
        mask, seen = anchor_mask(documents, at(anchors), window), context_positions(documents, at(anchors))
        attend = gpu.flex_anchored if flex else anchored_attention
        return [attend(x[0], (x[1][seen], x[2][seen]), (x[3], x[4]), mask, is_causal).flatten(2)]

    def expected(x: Sequence[Tensor]) -> list[Tensor]:
        context, block = (x[1], x[2]), (x[3], x[4])
        return [reference.anchored_attention(x[0], context, block, documents, anchors, is_causal, window)]

    return Case(inputs, run, expected, differentiable=not flex)


def losses(dtype: torch.dtype, target_dtype: torch.dtype, terms: Mapping[str, float], width: int) -> Case:
    """Losses, and their gradients as results: the function computes them itself."""
    rows, weight = torch.arange(20) // 3, drawn(20).abs()

    def inputs() -> list[Tensor]:
        z, target = drawn(20, width, scale=3.0), drawn(7, width, scale=3.0, seed=1)
        z[::3] = target[rows[::3]] + 0.1 * z[::3]  # some that nearly agree
        return [z.to(dtype), target.to(target_dtype)]

    def run(x: Sequence[Tensor]) -> list[Tensor]:
        z = x[0].clone()
        loss, correct = divergences.loss_and_grad(z, x[1], at(rows), terms, at(weight))
        only_loss, only_correct = divergences.loss_and_grad(x[0].clone(), x[1], at(rows), terms, with_grad=False)
        assert torch.equal(loss, only_loss)
        assert torch.equal(correct, only_correct)
        return [loss, z, correct.float()]

    def expected(x: Sequence[Tensor]) -> list[Tensor]:
        z = x[0].clone().requires_grad_()
        loss = reference.losses(z, x[1][rows], terms)
        (grad,) = torch.autograd.grad((loss * weight).sum(), z)
        return [loss.detach(), grad, (x[0].argmax(-1) == x[1].argmax(-1)[rows]).double()]

    return Case(inputs, run, expected, differentiable=False)


def distillation(dtype: torch.dtype, terms: Mapping[str, float], trained: bool, reweighted: bool, capped: bool) -> Case:
    """Loss and gradients of hidden states and, if it is trained, head; `reweighted`: weights follow from the losses."""
    index, weight = torch.tensor([3, 0, 3, 5, 0, 3, 9, 9]), drawn(8).abs()
    norm_weight, target_head, target_states = drawn(16, seed=2), drawn(50, 16, seed=3), drawn(10, 16, scale=0.1, seed=4)
    scale, softcap = (0.5, 3.0) if capped else (1.0, None)

    def run(x: Sequence[Tensor]) -> list[Tensor]:
        target = TargetHead(
            norm_weight=at(norm_weight), norm_eps=EPS, head=at(target_head), scale=scale, softcap=softcap
        )
        head = x[1] if trained else x[1].detach()
        by: Any = (lambda loss: (-loss).exp()) if reweighted else at(weight)
        with torch.autocast(DEVICE, BF16, enabled=dtype is BF16):
            loss, each, _ = distillation_loss(x[0], at(index), by, at(target_states), head, target, terms, 200)
        return [loss if trained else loss + 0.0 * x[1].sum(), each.detach()]

    def expected(x: Sequence[Tensor]) -> list[Tensor]:
        head = x[1] if trained else x[1].detach()
        target = reference.target_logits(
            target_states.double(), norm_weight.double(), EPS, target_head.double(), scale, softcap
        )[index]
        each = reference.losses(reference.linear(x[0], head), target, terms).detach()
        by = (-each).exp() if reweighted else weight.double()
        loss = reference.distillation_loss(x[0], head, target, by, terms)
        return [loss if trained else loss + 0.0 * x[1].sum(), each]

    return Case(lambda: [drawn(8, 16), drawn(50, 16)], run, expected, norm_tolerance=0.05 * (dtype is BF16))


def hidden_loss() -> Case:
    return Case(
        lambda: [drawn(9, 16), drawn(9, 16, seed=1)],
        lambda x: [hidden_state_loss(x[0], x[1])],
        lambda x: [reference.hidden_state_loss(x[0], x[1])],
    )


SHAPES = [(6, 20), (20, 6), (7, 9), (20, 6), (8, 8)]


def muon_step(dtype: torch.dtype, block: int, grad_dtype: torch.dtype) -> Case:
    """Weights, their bfloat16 copies and momenta after two updates."""
    beta, factor, lr, decay = 0.9, 0.25, 1.0, 0.3
    grads = [[drawn(*shape, dtype=grad_dtype, seed=step) for shape in SHAPES] for step in (2, 3)]

    def run(x: Sequence[Tensor]) -> list[Tensor]:
        parameters, momenta = [p.clone() for p in x], [torch.zeros_like(p) for p in x]
        copies = [weights.rounded(p, BF16) for p in parameters]
        for step in grads:
            for index, update in muon.muon_updates(momenta, [at(g) for g in step], beta, factor, dtype, block):
                size = lr * muon.update_scale(SHAPES[index])
                weights.apply_update(parameters[index], update, 1.0 - lr * decay, size)
        copies = [weights.rounded(p, BF16) for p in parameters]
        assert all(torch.equal(copy, p.bfloat16()) for copy, p in zip(copies, parameters, strict=True))
        return [*parameters, *momenta]

    def orthogonal(x: Tensor) -> Tensor:
        if x.shape[0] > x.shape[1]:
            return orthogonal(x.mT).mT
        if block:
            return torch.cat([polar(rows) for rows in x.split(block)])
        return polar(x)

    def polar(x: Tensor) -> Tensor:
        if dtype is F32:
            return reference.zolotarev(x, muon.SCALE, muon.WEIGHTS, muon.POLES)
        return reference.polar_express(x, muon.QUINTICS)

    def expected(x: Sequence[Tensor]) -> list[Tensor]:
        parameters, momenta = list(x), [torch.zeros_like(p) for p in x]
        for step in grads:
            for i, grad in enumerate(step):
                momenta[i], direction = reference.nesterov(momenta[i], factor * grad.double(), beta)
                parameters[i] = reference.muon_weight(parameters[i], orthogonal(direction), lr, decay)
        return [*parameters, *momenta]

    inputs = lambda: [drawn(*shape, scale=0.1) for shape in SHAPES]  # noqa: E731
    return Case(inputs, run, expected, 1e-4, 0.2 * (dtype is BF16), exact_results=len(SHAPES), differentiable=False)


def norm_of_grads(dtype: torch.dtype) -> Case:
    return Case(
        lambda: [drawn(33, 57, dtype=dtype), drawn(5, dtype=dtype)],
        lambda x: [weights.grad_norm(x).float()],
        lambda x: [torch.cat([each.flatten() for each in x]).norm()],
        tolerance=TOLERANCE[dtype],
        differentiable=False,
    )


MIXTURES: list[dict[str, float]] = [
    *({loss.value: 1.0} for loss in Loss),
    *({loss.value: 2.5} for loss in Loss),
    {"kl": 0.7, "tv": 0.3},
    {loss.value: 0.1 * (i + 1) for i, loss in enumerate(Loss)},
]


def cases(flex: bool = False) -> Iterator[tuple[str, Case]]:
    """All cases by name; `flex`: attention alone."""
    for short, dtype in (("float32", F32), ("bfloat16", BF16)):
        for name, lengths in DOCUMENTS.items():
            for later in (0, 2):
                for width in (8, 40):
                    case = causal(dtype, lengths, later, width, flex)
                    yield f"causal attention, {later} later steps, width {width}, {name}, {short}", case
            for is_causal, window, length in ((False, None, 4), (True, None, 3), (False, 5, 3), (True, 40, 4)):
                case = anchored(dtype, lengths, length, is_causal, window, flex)
                yield (
                    f"anchored attention, causal {is_causal}, window {window}, {length} queries, {name}, {short}",
                    case,
                )
        if flex:
            continue
        yield f"rms_norm, {short}", rms_norm(dtype)
        yield f"rms_norm for a product, {short}", rms_norm(dtype, feeds_matmul=True)
        yield f"apply_rotary, {short}", rotary(dtype)
        yield f"silu_mul, {short}", silu_mul(dtype)
        yield f"linear, {short}", linear(dtype)
        yield f"grad_norm, {short}", norm_of_grads(dtype)
        for terms in MIXTURES:
            name = " + ".join(f"{weight:.1f} {term}" for term, weight in terms.items())
            yield f"loss_and_grad, {name}, {short}", losses(dtype, F32, terms, 259)
        for width in (1, 15, 16, 1000):
            for term in ("kl", "ce"):
                yield f"loss_and_grad, {term}, width {width}, {short}", losses(dtype, BF16, {term: 1.0}, width)
        for trained in (False, True):
            for reweighted in (False, True):
                name = f"distillation_loss, trained head {trained}, reweighted {reweighted}, {short}"
                yield name, distillation(dtype, {"kl": 1.0}, trained, reweighted, capped=reweighted)
        yield f"distillation_loss, mixture, {short}", distillation(dtype, {"ce": 0.5, "js": 0.5}, True, False, True)
        for block in (0, 4):
            yield f"Muon, blocks of {block}, {short}", muon_step(dtype, block, dtype)
    if not flex:
        yield "hidden_state_loss", hidden_loss()


CASES = dict(cases())
FLEX = dict(cases(flex=True))
RUNS = [
    *(pytest.param(way, name, id=f"{way}: {name}") for way in ("cpp", "torch") for name in CASES),
    *(pytest.param("flex", name, id=f"flex: {name}") for name in FLEX),
    *(pytest.param("cuda", name, id=f"cuda: {name}", marks=pytest.mark.gpu) for name in CASES),
]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("way", "name"), RUNS)
def test_an_implementation_computes_what_the_reference_does(
    way: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "cpp" and cpu.missing():
        pytest.skip(cpu.missing())
    if way == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    if way != "cpp":
        monkeypatch.setattr(cpu, "kernels", lambda *_: None)
    if way == "cuda":
        monkeypatch.setitem(globals(), "DEVICE", "cuda")
    case = (FLEX if way == "flex" else CASES)[name]
    inputs = case.inputs()
    ours = [at(x.clone()).requires_grad_(case.differentiable) for x in inputs]
    doubles = [x.double().requires_grad_(case.differentiable) for x in map(torch.clone, inputs)]
    results, expected = case.run(ours), case.expected(doubles)
    pairs = list(zip(results, expected, strict=True))
    if case.differentiable:
        grads = [drawn(*x.shape, seed=5) for x in expected]
        differentiable = [i for i, x in enumerate(expected) if x.requires_grad]
        for actual, tensors in ((ours, results), (doubles, expected)):
            torch.autograd.backward(
                [tensors[i] for i in differentiable], [grads[i].to(tensors[i]) for i in differentiable]
            )
            assert all(x.grad is not None for x in actual)
        pairs += [(x.grad, y.grad) for x, y in zip(ours, doubles, strict=True)]  # type: ignore[misc]
    for i, (actual, expected_tensor) in enumerate(pairs):
        is_exact = len(results) - case.exact_results <= i < len(results)
        tolerance, norm_tolerance = (0.0, 0.0) if is_exact else (case.tolerance, case.norm_tolerance)
        compare(actual.detach().cpu(), expected_tensor.detach(), tolerance, norm_tolerance, f"tensor {i} of {name}")


def compare(actual: Tensor, expected_tensor: Tensor, tolerance: float, norm_tolerance: float, what: str) -> None:
    """Hold a result against the expected one, as the module's docstring says."""
    assert actual.shape == expected_tensor.shape, what
    if norm_tolerance:
        assert (actual.double() - expected_tensor).norm() <= norm_tolerance * expected_tensor.norm(), what
        return
    largest = float(expected_tensor.abs().max()) if expected_tensor.numel() else 0.0
    error = float((actual.double() - expected_tensor).abs().max()) if expected_tensor.numel() else 0.0
    tolerance = max(tolerance, TOLERANCE[actual.dtype])
    assert error <= tolerance * largest + 1e-9, f"{what}: {error:.2g} off, largest {largest:.2g}"


def test_every_loss_of_the_options_has_an_implementation_and_a_reference() -> None:
    assert [loss.value for loss in Loss] == list(divergences.TERMS) == list(reference.LOSSES)
