"""paired_dpo_loss against a float64 oracle that is written from the paper's formula in NumPy."""

import importlib
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cdpo.kernels import PairedLoss, layout, paired_dpo_loss, use
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import DTYPES, EPS32, drawn_cases
from torch import Tensor

module = importlib.import_module("cdpo.kernels.paired_dpo_loss.op")

DISTANCES = ("mse", "pseudo_huber")
C = 1e-3


class Case(NamedTuple):
    policy: Tensor
    reference: Tensor
    target: Tensor
    scale: float
    distance: str
    slopes: Tensor | None = None
    weights: Tensor | None = None
    loser_gradient: float = 1.0
    safeguard: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        names = ("distance", "slopes", "weights", "loser_gradient", "safeguard")
        return {name: getattr(self, name) for name in names}

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Those of the operator, in its order."""
        tensors = (*self[:3], self.slopes, self.weights)
        return (*tensors, self.scale, self.distance, C, self.loser_gradient, self.safeguard)

    def loss(self) -> PairedLoss:
        return paired_dpo_loss(*self[:4], **self.options)

    def loss_and_grad(self) -> tuple[PairedLoss, Tensor]:
        policy = self.policy.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        result = self._replace(policy=policy).loss()
        result.loss.backward()
        assert policy.grad is not None
        return result, policy.grad


def make(
    pairs: int = 3,
    shape: tuple[int, ...] = (4, 7, 5),
    dtypes: tuple[torch.dtype, ...] = (torch.float32,) * 3,
    *,
    scale: float = 2500.0,
    distance: str = "mse",
    shared: bool = True,
    cached: bool = False,
    gap: float = 0.01,
    sloped: bool = False,
    weighted: bool = False,
    loser_gradient: float = 1.0,
    safeguard: float | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randn(n, *shape, generator=generator)  # noqa: E731
    target = draw(pairs if shared else 2 * pairs)
    policy = draw(2 * pairs).to(dtypes[0])
    reference = (policy.float() + gap * draw(2 * pairs)).to(dtypes[1])
    # As a consistency function's by a prediction of noise: negative, and steep
    steepest = 16.0 if distance == "pseudo_huber" else 1.0  # above, fp16's gradients overflow
    slopes = -steepest * torch.rand(pairs, generator=generator) ** 2 if sloped else None
    weights = 2 * torch.rand(pairs, generator=generator) if weighted else None
    if cached:
        wide = target if not shared else torch.cat([target, target])
        reference = torch.from_numpy(oracle_error(reference, wide, distance, slopes)).float()
    on = lambda x: x if x is None else x.to(device)  # noqa: E731
    tensors = (on(policy), on(reference), on(target.to(dtypes[2])))
    return Case(*(*tensors, scale, distance, on(slopes), on(weights), loser_gradient, safeguard))


def oracle_residual(prediction: Tensor, target: Tensor, slopes: Tensor | None) -> np.ndarray:
    """(2B, n)"""
    x = (prediction.double() - target.double()).cpu().flatten(1).numpy()
    return x if slopes is None else np.tile(slopes.cpu().double().numpy(), 2)[:, None] * x


def oracle_error(
    prediction: Tensor, target: Tensor, distance: str, slopes: Tensor | None
) -> np.ndarray:
    x = oracle_residual(prediction, target, slopes)
    return (x**2 if distance == "mse" else np.sqrt(x**2 + C**2) - C).mean(axis=1)


class Truth(NamedTuple):
    loss: float
    logits: np.ndarray
    policy_error: np.ndarray
    reference_error: np.ndarray
    grad: np.ndarray
    loser_kept: np.ndarray
    logit_tolerance: np.ndarray


def oracle(case: Case) -> Truth:
    policy, reference, target = (x.detach().cpu().double() for x in case[:3])
    pairs = len(policy) // 2
    if len(target) == pairs:
        target = torch.cat([target, target])
    e_policy = oracle_error(policy, target, case.distance, case.slopes)
    cached = reference.ndim == 1
    e_reference = reference.numpy()
    if not cached:
        e_reference = oracle_error(reference, target, case.distance, case.slopes)
    gain = e_policy - e_reference
    scale = float(np.float32(case.scale))
    if case.weights is not None:
        scale = scale * case.weights.cpu().double().numpy()
    logits = -scale * (gain[:pairs] - gain[pairs:])
    x = oracle_residual(policy, target, case.slopes)
    pull = 2 * x if case.distance == "mse" else x / np.sqrt(x**2 + C**2)
    kept = np.full(pairs, float(np.float32(case.loser_gradient)))
    if case.safeguard is not None:
        # That step of the loser which leaves the winner its share, found by its own words
        for pair, (winner, loser) in enumerate(zip(pull[:pairs], pull[pairs:], strict=True)):
            if winner @ loser > 0:
                bears = (1 - float(np.float32(case.safeguard))) * (winner @ winner)
                kept[pair] *= min(1.0, bears / (winner @ loser))
    slope = np.ones(pairs) if case.slopes is None else case.slopes.cpu().double().numpy()
    weight = scale * slope * np.exp(-np.logaddexp(0, logits)) / pairs / x[0].size
    weight = np.concatenate([weight, -kept * weight])[:, None]
    # What rounding in float32 may do to a logit: a few ulps of the sizes that are added up. With
    # cached errors these are the errors; with predictions only the differences of the errors.
    if cached:
        size = e_policy + np.abs(e_reference)
    else:
        r = oracle_residual(reference, target, case.slopes)
        root = 1.0 if case.distance == "mse" else np.sqrt(x**2 + C**2) + np.sqrt(r**2 + C**2)
        step = oracle_residual(policy, reference, case.slopes)
        size = (np.abs(step) * (np.abs(x) + np.abs(r)) / root).mean(axis=1)
    tolerance = 8 * EPS32 * (scale * (size[:pairs] + size[pairs:]) + np.abs(logits)) + 1e-37
    grad = (weight * pull).reshape(policy.shape)
    loss = np.logaddexp(0, -logits).mean()
    return Truth(loss, logits, e_policy, e_reference, grad, kept, tolerance)


def check(case: Case) -> None:
    result, grad = case.loss_and_grad()
    truth = oracle(case)
    plain = plain_errors(case, truth)
    error = {
        "policy_error": (np.abs(result.policy_error.cpu().numpy() - truth.policy_error)).max(),
        "reference_error": np.abs(
            result.reference_error.cpu().numpy() - truth.reference_error
        ).max(),
    }
    for name, value in error.items():
        assert value <= 2 * plain[name] + 2 * EPS32 * getattr(truth, name).max(), name
    logit_error = np.abs(result.logits.cpu().numpy() - truth.logits)
    assert (logit_error <= truth.logit_tolerance).all(), (logit_error, truth.logit_tolerance)
    assert logit_error.max() <= 2 * plain["logits"] + truth.logit_tolerance.max()
    assert abs(result.loss.item() - truth.loss) <= truth.logit_tolerance.mean() + 4 * EPS32 * (
        truth.loss
    )
    # One ulp of the gradient's dtype (the interpreter truncates to bf16), the logit's tolerance,
    # which shifts σ(−logit) by that relative amount, and the smallest number of the dtype.
    info = torch.finfo(case.policy.dtype)
    pairs = len(truth.logits)
    slack = np.concatenate([truth.logit_tolerance] * 2).reshape(-1, *[1] * (truth.grad.ndim - 1))
    if case.safeguard is not None:
        slack[pairs:] += 1e-4
    slack = (
        slack + 16 * EPS32 + EPS32 * np.abs(np.concatenate([truth.logits] * 2)).reshape(slack.shape)
    )
    bound = np.abs(truth.grad) * (info.eps + slack) + info.smallest_normal * info.eps
    assert grad.dtype == case.policy.dtype
    assert len(result.logits) == pairs
    np.testing.assert_allclose(result.loser_kept.cpu(), truth.loser_kept, rtol=1e-4)
    assert (np.abs(grad.cpu().double().numpy() - truth.grad) <= bound).all()


def plain_errors(case: Case, truth: Truth) -> dict[str, float]:
    """What the formula loses when typed into PyTorch in float32."""
    policy, reference, target = (x.float().cpu() for x in case[:3])
    if len(target) != len(policy):
        target = torch.cat([target, target])
    slopes = torch.ones(len(policy)) if case.slopes is None else case.slopes.cpu().repeat(2)
    weights = 1.0 if case.weights is None else case.weights.cpu()

    def distance(prediction: Tensor) -> Tensor:
        x = (prediction - target) * slopes.view(-1, *[1] * (target.ndim - 1))
        return (x**2 if case.distance == "mse" else (x**2 + C**2).sqrt() - C).flatten(1).mean(1)

    e_policy = distance(policy)
    e_reference = reference if reference.ndim == 1 else distance(reference)
    winner, loser = (e_policy - e_reference).chunk(2)
    found = {"policy_error": e_policy, "reference_error": e_reference}
    found["logits"] = -case.scale * weights * (winner - loser)
    return {name: np.abs(x.numpy() - getattr(truth, name)).max() for name, x in found.items()}


# --------------------------------------------------------------------------------------- numbers


@drawn_cases
@given(
    pairs=st.integers(1, 5),
    shape=st.lists(st.integers(1, 13), min_size=1, max_size=3).map(tuple),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    scale=st.sampled_from([1.0, 0.3, 200.0, 2500.0]),
    distance=st.sampled_from(DISTANCES),
    shared=st.booleans(),
    cached=st.booleans(),
    gap=st.sampled_from([0.0, 1e-3, 1.0]),
    sloped=st.booleans(),
    weighted=st.booleans(),
    loser_gradient=st.sampled_from([1.0, 0.5, 0.0]),
    safeguard=st.sampled_from([None, 0.0, 0.6, 0.9]),
    seed=st.integers(0, 1000),
)
def test_agrees_with_oracle(backend, device, **choices):  # type: ignore[no-untyped-def]
    check(make(**choices, device=device))


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("shape", [(1,), (3, 683), (2049,), (4, 96, 97)], ids=str)
def test_sizes_around_blocks_and_chunks(backend, device, shape, distance):
    check(make(2, shape, (torch.bfloat16,) * 3, distance=distance, device=device))


def test_sdxl_sized_sample(backend, device):
    check(make(1, (4, 128, 128), (torch.bfloat16,) * 3, device=device))


def test_many_pairs_and_many_chunks(backend, device, monkeypatch):
    """The loops over tiles of pairs and of chunks run more than once."""
    monkeypatch.setattr(module, "MAX_TILE", 4)
    monkeypatch.setattr(module, "MAX_BLOCK", 128)
    monkeypatch.setattr(module, "MAX_WARPS", 1)
    everything = {"sloped": True, "weighted": True, "safeguard": 0.9}
    check(make(9, (128 * 9 + 1,), device=device, **everything))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("pairs", [1, 7])
def test_identical_networks(backend, device, pairs, distance, dtype):
    """Logit 0, loss log 2 to the last bit, with predictions and with errors cached before."""
    case = make(pairs, (4, 31, 17), (dtype,) * 3, distance=distance, gap=0.0, device=device)
    log_2 = np.float32(math.log(2))
    result = case.loss()
    assert (result.logits == 0).all()
    assert np.float32(result.loss.item()) == log_2
    assert torch.equal(result.policy_error, result.reference_error)
    again = case._replace(reference=result.reference_error).loss()
    assert (again.logits == 0).all()
    assert np.float32(again.loss.item()) == log_2


@pytest.mark.parametrize("logit", [0.0, 1e-3, -1e-3, 3.0, -3.0, 17.0, -17.0, 60.0, 85.0, -1e4])
def test_log_sigmoid_in_its_tails(backend, device, logit):
    zeros = torch.zeros(2, 3, device=device)
    cached = torch.tensor([logit, 0.0], device=device)
    loss = paired_dpo_loss(zeros, cached, zeros, 1.0).loss.item()
    truth = np.logaddexp(0.0, -np.float64(np.float32(logit)))
    assert abs(loss - truth) <= (4 + abs(logit)) * EPS32 * truth


def test_extreme_logits_have_finite_loss_and_gradient(backend, device):
    case = make(2, (8,), scale=1e8, gap=1.0, device=device)
    result, grad = case.loss_and_grad()
    assert result.logits.abs().min() > 1e5
    assert result.loss.isfinite()
    assert grad.isfinite().all()
    check(case)


def test_float64_accumulates_in_float64():
    case = make(2, dtypes=(torch.float64,) * 3)
    result = case.loss()
    assert {x.dtype for x in result} == {torch.float64}
    np.testing.assert_allclose(result.logits.numpy(), oracle(case).logits, rtol=1e-11)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["policy", "reference", "target"])
def test_non_finite_input_stays_in_its_pair(backend, device, where, bad):
    case = make(3, shared=False, device=device)
    getattr(case, where)[4, 2, 3, 1] = bad  # the loser of pair 1
    result, grad = case.loss_and_grad()
    healthy = torch.tensor([True, False, True], device=device)
    assert torch.equal(result.logits.isfinite(), healthy)
    assert grad[healthy.repeat(2)].isfinite().all()
    clean = make(3, shared=False, device=device).loss()
    assert torch.equal(result.logits[healthy], clean.logits[healthy])


# ------------------------------------------------------------------------------ gradient, autograd


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_gradcheck(distance, cached, shared):
    case = make(
        2, (2, 3), (torch.float64,) * 3, distance=distance, cached=cached, shared=shared, scale=3.0
    )
    policy = case.policy.requires_grad_()

    def loss(p: Tensor) -> Tensor:
        return paired_dpo_loss(p, *case[1:4], distance=distance, huber_c=0.5).loss

    with use("auto"):
        assert torch.autograd.gradcheck(loss, policy)


def test_gradient_follows_grad_output_and_leaves_it_alone(backend, device):
    case = make(device=device)
    _, once = case.loss_and_grad()
    policy = case.policy.requires_grad_()
    grad_output = torch.tensor(4.0, device=device)
    case.loss().loss.backward(grad_output)
    assert torch.equal(policy.grad, 4 * once)
    assert grad_output.item() == 4.0


def test_only_policy_and_only_loss_are_differentiable(backend, device):
    case = make(device=device)
    for tensor in case[:3]:
        tensor.requires_grad_()
    result = case.loss()
    assert result.loss.requires_grad
    assert not any(x.requires_grad for x in result[1:])
    result.loss.backward()
    assert case.policy.grad is not None
    assert case.reference.grad is None
    assert case.target.grad is None


def test_ref_is_differentiated_by_pytorch_to_the_same(backend, device):
    case = make(distance="pseudo_huber", sloped=True, weighted=True, safeguard=0.5, device=device)
    result, grad = case.loss_and_grad()
    policy = case.policy.detach().requires_grad_()
    how = module.Comparison(*case.arguments[3:]).rounded()
    plain = module.paired_dpo_loss_ref(policy, *case[1:3], how)
    plain.loss.backward()
    torch.testing.assert_close(grad, policy.grad, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(result, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("safeguard", [0.0, 0.6, 1.0])
def test_the_safeguard_leaves_the_winner_its_share(backend, device, safeguard, distance):
    """The loser of pair 0 is nearly its winner, that of pair 1 the opposite, of pair 2 another."""
    case = make(distance=distance, safeguard=safeguard, device=device)
    winner = (case.policy - case.target.repeat(2, 1, 1, 1))[:3]
    loser = winner.clone()
    loser[0] += 0.1 * torch.randn_like(winner[0])
    loser[1] = -winner[1]
    loser[2] = 30 * winner[2].flip(0, 1, 2)
    policy = torch.cat([winner, loser]) + case.target.repeat(2, 1, 1, 1)
    result, grad = case._replace(policy=policy).loss_and_grad()
    _, plain = case._replace(policy=policy, safeguard=None).loss_and_grad()
    torch.testing.assert_close(grad[:3], plain[:3], rtol=0, atol=0)
    torch.testing.assert_close(grad[3:], result.loser_kept.view(3, 1, 1, 1) * plain[3:])
    # The first-order change of the winner's error when policy goes against its gradients, if both
    # images were one: what counts is what the loser's step takes from the winner's.
    own, taken = ((grad[:3] * x).flatten(1).sum(1) for x in (grad[:3], -grad[3:]))
    assert (taken <= (1 - safeguard) * own * 1.001 + 1e-12).all()
    assert result.loser_kept[1] == 1
    assert result.loser_kept[0] <= 1 - safeguard + 0.1


# ---------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("cached", [False, True])
def test_every_output_element_is_written(backend, device, poison, cached):
    case = make(3, (5, 411), cached=cached, safeguard=0.9, device=device)
    result, grad = case.loss_and_grad()
    assert all(x.isfinite().all() for x in (*result, grad))


@pytest.mark.parametrize("shape", [(7,), (3, 1001)], ids=str)
def test_reads_and_writes_nothing_outside(backend, device, shape, fences, monkeypatch):
    case = make(2, shape, sloped=True, weighted=True, safeguard=0.9, device=device)
    expected = case.loss_and_grad()
    names = ("policy", "reference", "target", "slopes", "weights")
    fenced = case._replace(**{name: fences.around(getattr(case, name)) for name in names})
    policy = fenced.policy.requires_grad_()
    fences.watch(monkeypatch)
    result = fenced.loss()
    (grad,) = torch.autograd.grad(result.loss, policy)
    monkeypatch.undo()
    assert fences.intact()
    for found, right in zip((*result, grad), (*expected[0], expected[1]), strict=True):
        assert torch.equal(found, right)


def test_channels_last_is_read_as_it_lies(backend, device):
    case = make(2, (4, 9, 11), shared=False, device=device)
    expected, expected_grad = case.loss_and_grad()
    last = case._replace(
        **{
            name: getattr(case, name).to(memory_format=torch.channels_last)
            for name in ("policy", "reference", "target")
        }
    )
    matched = layout.match_samples(*last[:3])
    assert all(found is given for found, given in zip(matched, last[:3], strict=True))
    result, grad = last.loss_and_grad()
    assert grad.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-8)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "batch_innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "channel_slice": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "every_second": lambda x: torch.stack([x, x], dim=1)[:, 0],
}


@pytest.mark.parametrize("policy_layout", LAYOUTS)
def test_any_strides(backend, device, policy_layout):
    case = make(2, (3, 4, 5), device=device)
    _, expected = case.loss_and_grad()
    policy = LAYOUTS[policy_layout](case.policy).requires_grad_()
    for target_layout in LAYOUTS.values():
        result = case._replace(policy=policy, target=target_layout(case.target)).loss()
        (grad,) = torch.autograd.grad(result.loss, policy)
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-7)
        assert grad.stride() == torch.empty_like(policy).stride()


def test_expanded_target(backend, device):
    case = make(3, device=device)
    one = case.target[:1]
    repeated = case._replace(target=one.repeat(3, 1, 1, 1)).loss()
    expanded = case._replace(target=one.expand(3, -1, -1, -1)).loss()
    assert all(torch.equal(a, b) for a, b in zip(repeated, expanded, strict=True))


def test_deterministic_and_independent_of_the_batch(backend, device):
    case = make(5, (3, 1000), distance="pseudo_huber", device=device)
    result, grad = case.loss_and_grad()
    result_2, grad_2 = case.loss_and_grad()
    assert all(torch.equal(a, b) for a, b in zip((*result, grad), (*result_2, grad_2), strict=True))
    pick = [3, 8]
    alone = Case(case.policy[pick], case.reference[pick], case.target[3:4], *case[3:]).loss()
    if backend == "triton":
        assert torch.equal(alone.logits, result.logits[3:4])
    torch.testing.assert_close(alone.logits, result.logits[3:4], rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------ torch.library


@pytest.mark.parametrize(
    ("dtype", "cached"), [(torch.float32, True), (torch.bfloat16, False)], ids=str
)
def test_opcheck(backend, device, dtype, cached):
    options = {"sloped": True, "weighted": True, "safeguard": 0.9} if cached else {}
    case = make(2, (2, 3), (dtype,) * 3, cached=cached, device=device, **options)
    policy = case.policy.to(memory_format=torch.contiguous_format).requires_grad_()
    args = case._replace(policy=policy).arguments
    torch.library.opcheck(torch.ops.cdpo.paired_dpo_loss, args)
    _, logits, *_, kept = case.loss()
    one = torch.ones((), device=device)
    args = (one, logits, kept, policy.detach(), case.target, case.slopes, case.weights)
    torch.library.opcheck(torch.ops.cdpo.paired_dpo_loss_backward, (*args, 2500.0, "mse", C))


def test_compiles_without_graph_breaks(backend, device):
    def step(policy: Tensor, reference: Tensor, target: Tensor, scale: float) -> PairedLoss:
        return paired_dpo_loss(policy.tanh(), reference, target, scale, distance="pseudo_huber")

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for pairs, scale in ((2, 2500.0), (3, 200.0)):
        case = make(pairs, (2, 5), device=device)
        policy = case.policy.requires_grad_()
        expected, found = step(*case[:3], scale), compiled(*case[:3], scale)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        (grad,) = torch.autograd.grad(expected.loss, policy)
        (found_grad,) = torch.autograd.grad(found.loss, policy)
        torch.testing.assert_close(found_grad, grad)


# -------------------------------------------------------------------------------------- bad input

ONE = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"policy is \(3, 3\); taken is \(2B", {"policy": torch.zeros(3, 3)}),
        (ValueError, r"policy is \(0, 3\)", {"policy": torch.zeros(0, 3)}),
        (ValueError, r"policy is \(2, 0\)", {"policy": torch.zeros(2, 0)}),
        (ValueError, r"policy is \(2,\)", {"policy": torch.zeros(2)}),
        (ValueError, r"reference is \(2, 4\).*\(2, 3\)", {"reference": torch.zeros(2, 4)}),
        (ValueError, r"reference is \(3,\).*\(2,\)", {"reference": torch.zeros(3)}),
        (ValueError, r"target is \(3, 3\).*\(1, 3\)", {"target": torch.zeros(3, 3)}),
        (TypeError, r"policy is torch.int64", {"policy": ONE.long()}),
        (TypeError, r"target is torch.complex64", {"target": ONE.cfloat()}),
        (TypeError, r"reference errors are torch.float16", {"reference": torch.zeros(2).half()}),
        (ValueError, r"one device; given policy on cpu.*meta", {"target": ONE.to("meta")}),
        (ValueError, r"distance is 'l1'; taken are mse", {"distance": "l1"}),
        (ValueError, r"huber_c is 0.0; it must be positive", {"huber_c": 0.0}),
        (ValueError, r"huber_c is nan", {"huber_c": math.nan}),
        (ValueError, r"scale is -1.0", {"scale": -1.0}),
        (ValueError, r"slopes is \(2,\); it must be \(1,\)", {"slopes": torch.ones(2)}),
        (TypeError, r"weights is torch.float64", {"weights": torch.ones(1).double()}),
        (ValueError, r"one device; given.*slopes on meta", {"slopes": torch.ones(1).to("meta")}),
        (ValueError, r"loser_gradient is 1.5; it must be from 0 to 1", {"loser_gradient": 1.5}),
        (ValueError, r"safeguard is nan", {"safeguard": math.nan}),
        (ValueError, r"scale is inf", {"scale": math.inf}),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_bad_input(error, message, arguments):
    good = {"policy": ONE, "reference": ONE, "target": ONE, "scale": 1.0}
    with pytest.raises(error, match=message):
        paired_dpo_loss(**(good | arguments))
