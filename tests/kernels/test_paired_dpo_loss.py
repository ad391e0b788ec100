"""paired_dpo_loss against a float64 oracle that is written from the paper's formula in NumPy."""

import importlib
import math
from typing import NamedTuple

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

    def loss(self) -> PairedLoss:
        return paired_dpo_loss(*self[:4], distance=self.distance)

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
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randn(n, *shape, generator=generator)  # noqa: E731
    target = draw(pairs if shared else 2 * pairs)
    policy = draw(2 * pairs).to(dtypes[0])
    reference = (policy.float() + gap * draw(2 * pairs)).to(dtypes[1])
    if cached:
        wide = target if not shared else torch.cat([target, target])
        reference = torch.from_numpy(oracle_error(reference, wide, distance)).float()
    return Case(
        policy.to(device), reference.to(device), target.to(dtypes[2]).to(device), scale, distance
    )


def oracle_error(prediction: Tensor, target: Tensor, distance: str) -> np.ndarray:
    x = (prediction.double() - target.double()).cpu().numpy()
    x = x.reshape(len(x), -1)
    return (x**2 if distance == "mse" else np.sqrt(x**2 + C**2) - C).mean(axis=1)


class Truth(NamedTuple):
    loss: float
    logits: np.ndarray
    policy_error: np.ndarray
    reference_error: np.ndarray
    grad: np.ndarray
    logit_tolerance: np.ndarray


def oracle(case: Case) -> Truth:
    policy, reference, target = (x.detach().cpu().double() for x in case[:3])
    pairs = len(policy) // 2
    if len(target) == pairs:
        target = torch.cat([target, target])
    e_policy = oracle_error(policy, target, case.distance)
    cached = reference.ndim == 1
    e_reference = reference.numpy() if cached else oracle_error(reference, target, case.distance)
    gain = e_policy - e_reference
    scale = float(np.float32(case.scale))
    logits = -scale * (gain[:pairs] - gain[pairs:])
    x = (policy - target).numpy()
    slope = 2 * x if case.distance == "mse" else x / np.sqrt(x**2 + C**2)
    weight = scale * np.exp(-np.logaddexp(0, logits)) / pairs / x[0].size
    weight = np.concatenate([weight, -weight]).reshape(-1, *[1] * (x.ndim - 1))
    # What rounding in float32 may do to a logit: a few ulps of the sizes that are added up. With
    # cached errors these are the errors; with predictions only the differences of the errors.
    if cached:
        size = e_policy + np.abs(e_reference)
    else:
        p, r = policy.numpy() - target.numpy(), reference.numpy() - target.numpy()
        root = 1.0 if case.distance == "mse" else np.sqrt(p**2 + C**2) + np.sqrt(r**2 + C**2)
        step = (policy - reference).numpy()
        size = (np.abs(step) * (np.abs(p) + np.abs(r)) / root).reshape(2 * pairs, -1).mean(axis=1)
    tolerance = 8 * EPS32 * (scale * (size[:pairs] + size[pairs:]) + np.abs(logits)) + 1e-37
    return Truth(
        np.logaddexp(0, -logits).mean(), logits, e_policy, e_reference, weight * slope, tolerance
    )


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
    slack = (
        slack + 16 * EPS32 + EPS32 * np.abs(np.concatenate([truth.logits] * 2)).reshape(slack.shape)
    )
    bound = np.abs(truth.grad) * (info.eps + slack) + info.smallest_normal * info.eps
    assert grad.dtype == case.policy.dtype
    assert len(result.logits) == pairs
    assert (np.abs(grad.cpu().double().numpy() - truth.grad) <= bound).all()


def plain_errors(case: Case, truth: Truth) -> dict[str, float]:
    """What the formula loses when typed into PyTorch in float32."""
    policy, reference, target = (x.float().cpu() for x in case[:3])
    if len(target) != len(policy):
        target = torch.cat([target, target])

    def distance(prediction: Tensor) -> Tensor:
        x = prediction - target
        return (x**2 if case.distance == "mse" else (x**2 + C**2).sqrt() - C).flatten(1).mean(1)

    e_policy = distance(policy)
    e_reference = reference if reference.ndim == 1 else distance(reference)
    winner, loser = (e_policy - e_reference).chunk(2)
    found = {"policy_error": e_policy, "reference_error": e_reference}
    found["logits"] = -case.scale * (winner - loser)
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
    check(make(9, (128 * 9 + 1,), device=device))


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
    case = make(distance="pseudo_huber", device=device)
    result, grad = case.loss_and_grad()
    policy = case.policy.detach().requires_grad_()
    plain = module.paired_dpo_loss_ref(policy, *case[1:], C)
    plain.loss.backward()
    torch.testing.assert_close(grad, policy.grad, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(result, plain, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("cached", [False, True])
def test_every_output_element_is_written(backend, device, poison, cached):
    case = make(3, (5, 411), cached=cached, device=device)
    result, grad = case.loss_and_grad()
    assert all(x.isfinite().all() for x in (*result, grad))


@pytest.mark.parametrize("shape", [(7,), (3, 1001)], ids=str)
def test_reads_and_writes_nothing_outside(backend, device, shape, fences, monkeypatch):
    case = make(2, shape, device=device)
    expected = case.loss_and_grad()
    policy, reference, target = map(fences.around, case[:3])
    fenced = Case(policy.requires_grad_(), reference, target, *case[3:])
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
    case = make(2, (2, 3), (dtype,) * 3, cached=cached, device=device)
    policy = case.policy.to(memory_format=torch.contiguous_format).requires_grad_()
    args = (policy, case.reference, case.target, 2500.0, "pseudo_huber", C)
    torch.library.opcheck(torch.ops.cdpo.paired_dpo_loss, args)
    logits = case.loss().logits
    torch.library.opcheck(
        torch.ops.cdpo.paired_dpo_loss_backward,
        (torch.ones((), device=device), logits, policy.detach(), case.target, 2500.0, "mse", C),
    )


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
        (ValueError, r"scale is inf", {"scale": math.inf}),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_bad_input(error, message, arguments):
    good = {"policy": ONE, "reference": ONE, "target": ONE, "scale": 1.0}
    with pytest.raises(error, match=message):
        paired_dpo_loss(**(good | arguments))
