"""The Consistency-DPO step against a float64 oracle, plain PyTorch and diffusers."""

import math

import numpy as np
import pytest
import torch
from cdpo.kernels import SchedulePoint, paired_dpo_loss, use
from consistency_cases import (
    ALPHAS_CUMPROD,
    LATENTS,
    NETWORKS,
    PREDICTIONS,
    Case,
    Truth,
    clean_and_noise,
    gradient_oracle,
    make,
    numbers,
    outputs_oracle,
    solver_oracle,
)
from diffusers import DDIMScheduler, LCMScheduler
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import DTYPES, EPS32, drawn_cases
from torch import Tensor

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def check(found: Tensor, truth: Truth, roundings: int = 10) -> None:
    """No more is lost than that many roundings to float32, half an ulp each, and one ulp of the
    result's dtype (the interpreter truncates to bf16)."""
    info = torch.finfo(found.dtype)
    bound = roundings / 2 * EPS32 * truth.size + info.eps * np.abs(truth.value) + info.tiny
    assert found.shape == truth.value.shape
    assert (np.abs(numbers(found) - truth.value) <= bound).all()


# --------------------------------------------------------------------------------------- numbers


@drawn_cases
@given(
    pairs=st.integers(1, 4),
    shape=st.lists(st.integers(1, 11), min_size=1, max_size=3).map(tuple),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 6),
    out=st.sampled_from([None, *DTYPES]),
    prediction=st.sampled_from(PREDICTIONS),
    seed=st.integers(0, 1000),
)
def test_agrees_with_oracle(backend, device, pairs, shape, dtypes, out, prediction, seed):
    case = make(pairs, shape, dtypes, prediction=prediction, device=device, seed=seed)
    previous = case.solve(out)
    assert previous.dtype == (out or case.noisy.dtype)
    check(previous, solver_oracle(case))

    grad_output = torch.randn(case.policy.shape, generator=torch.Generator().manual_seed(seed))
    found, grad = case.outputs_and_grad(grad_output.to(device))
    for name, truth in outputs_oracle(case).items():
        assert getattr(found, name).dtype == torch.float32
        check(getattr(found, name), truth)
    assert grad.dtype == case.policy.dtype
    check(grad, gradient_oracle(case, grad_output))


def per_element(*per_pair: Tensor) -> tuple[Tensor, ...]:
    """For winner and loser, broadcast over samples of (C, H, W)."""
    return tuple(torch.cat([x, x]).view(-1, 1, 1, 1) for x in per_pair)


def typed_solver_step(case: Case) -> Tensor:
    """The method's text typed into PyTorch, at the precision of the latents."""
    dtype = case.noisy.dtype
    w, a, s, next_a, next_s = per_element(
        *(v.to(dtype) for v in (case.guidance, *case.now[1:], *case.earlier[1:]))
    )
    cond, uncond = (
        clean_and_noise(case.noisy, p, a, s, case.prediction) for p in case.teacher.chunk(2)
    )
    x0, eps = (c + w * (c - u) for c, u in zip(cond, uncond, strict=True))
    return next_a * x0 + next_s * eps


def typed_function(x: Tensor, output: Tensor, point: SchedulePoint, prediction: str) -> Tensor:
    t, a, s = per_element(*(v.to(x.dtype) for v in point))
    x0, _ = clean_and_noise(x, output, a, s, prediction)
    scaled = t / 0.1
    return 0.25 / (scaled**2 + 0.25) * x + scaled / (scaled**2 + 0.25) ** 0.5 * x0


def typed_outputs(case: Case) -> tuple[Tensor, ...]:
    now, later = (case.noisy, case.now), (case.previous, case.earlier)
    return tuple(
        typed_function(x, getattr(case, name), point, case.prediction)
        for name, (x, point) in zip(NETWORKS, (now, now, later), strict=True)
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loses_at_most_twice_what_plain_pytorch_loses(backend, device, dtype, prediction):
    case = make(4, (4, 24, 25), (dtype,) * 6, prediction=prediction, device=device)
    single = case.map(Tensor.float, "teacher", *LATENTS)
    found = (case.solve(), *case.outputs())
    typed = (typed_solver_step(single), *typed_outputs(single))
    truths = (solver_oracle(case), *outputs_oracle(case).values())
    for result, plain, truth in zip(found, typed, truths, strict=True):
        lost = np.abs(numbers(plain) - truth.value).max()
        ulp = torch.finfo(result.dtype).eps * np.abs(truth.value)
        assert lost > 0
        assert (np.abs(numbers(result) - truth.value) <= 2 * lost + ulp).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("shape", [(1,), (129,), (1023,), (2, 1025), (4, 33, 32)], ids=str)
def test_same_bits_as_pytorch(backend, device, shape, prediction):
    """At sizes around blocks; where the interpreter rounds: it truncates to bf16."""
    case = make(2, shape, (torch.float16,) * 6, prediction=prediction, device=device)
    found, grad = case.outputs_and_grad(case.noisy.float())
    both = [*(case.solve(dtype) for dtype in (None, torch.float32)), *found, grad]
    with use("torch"):
        plain, plain_grad = case.outputs_and_grad(case.noisy.float())
        expected = [*(case.solve(dtype) for dtype in (None, torch.float32)), *plain, plain_grad]
    assert all(torch.equal(a, b) for a, b in zip(both, expected, strict=True))


def test_same_bits_as_pytorch_at_every_timestep_of_the_solver(backend, device):
    case = make(50, (3,), timesteps=list(range(19, 1000, 20)), device=device)
    found, grad = case.outputs_and_grad(case.noisy)
    with use("torch"):
        plain, plain_grad = case.outputs_and_grad(case.noisy)
    assert all(torch.equal(a, b) for a, b in zip((*found, grad), (*plain, plain_grad), strict=True))


def test_other_scalings_to_the_bit(backend, device):
    """c_skip and c_out laid bare, beside NumPy in float32, for scalars that float32 has not."""
    case = make(7, (1,), prediction="sample", timesteps=[0, 1, 2, 3, 4, 5, 19], device=device)
    scalars = {"timestep_scaling": 0.3, "sigma_data": 1.3}
    ones, zeros = torch.ones_like(case.noisy), torch.zeros_like(case.noisy)
    c_skip = case._replace(noisy=ones, policy=zeros).outputs(**scalars).policy
    policy = torch.ones_like(ones, requires_grad=True)
    c_out = case._replace(noisy=zeros, policy=policy).outputs(**scalars).policy
    (slope,) = torch.autograd.grad(c_out, policy, ones)

    s = np.float32(0.3) * case.now.timesteps.cpu().numpy().astype(np.float32)
    variance = np.float32(1.3) * np.float32(1.3)
    expected = np.tile(s / np.sqrt(s * s + variance), 2)[:, None]
    assert (c_skip.cpu().numpy() == np.tile(variance / (s * s + variance), 2)[:, None]).all()
    assert (c_out.detach().cpu().numpy() == expected).all()
    assert (slope.cpu().numpy() == expected).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_target_at_time_zero_is_the_latents_themselves(backend, device, prediction):
    case = make(timesteps=[19, 5, 0], prediction=prediction, device=device)
    assert torch.equal(case.earlier.timesteps, torch.zeros_like(case.now.timesteps))
    found = case.outputs()
    assert torch.equal(found.target, case.previous)
    assert torch.equal(found.policy[[2, 5]], case.noisy[[2, 5]])
    assert not torch.equal(found.policy[0], case.noisy[0])


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identical_networks_have_logit_zero(backend, device, dtype, prediction):
    case = make(3, (4, 31, 17), (dtype,) * 6, prediction=prediction, device=device)
    found = case._replace(reference=case.policy.clone()).outputs()
    assert torch.equal(found.policy.view(torch.int32), found.reference.view(torch.int32))
    result = paired_dpo_loss(*found, 200.0, distance="pseudo_huber")
    assert (result.logits == 0).all()
    assert np.float32(result.loss.item()) == np.float32(math.log(2))
    cached = (found.policy, result.reference_error, found.target)
    assert (paired_dpo_loss(*cached, 200.0, distance="pseudo_huber").logits == 0).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_whole_step_against_plain_float64(backend, device, prediction):
    """Solver, functions and loss in a row, to the gradient of the policy's prediction."""
    beta, c = 3.0, 1e-3
    case = make(2, (4, 9, 9), prediction=prediction, timesteps=[119, 699], device=device)
    policy = case.policy.requires_grad_()
    result = paired_dpo_loss(
        *case._replace(previous=case.solve()).outputs(), beta, distance="pseudo_huber"
    )
    (grad,) = torch.autograd.grad(result.loss, policy)

    exact = case.map(lambda x: x.detach().double(), "teacher", *LATENTS)
    exact = exact._replace(previous=typed_solver_step(exact), policy=exact.policy.requires_grad_())
    f_policy, f_reference, y = typed_outputs(exact)
    d_policy, d_reference = (
        (((f - y) ** 2 + c**2).sqrt() - c).mean((1, 2, 3)) for f in (f_policy, f_reference)
    )
    winner, loser = (d_policy - d_reference).chunk(2)
    loss = -torch.nn.functional.logsigmoid(-beta * (winner - loser)).mean()
    (expected,) = torch.autograd.grad(loss, exact.policy)
    assert abs(result.loss.item() - loss.item()) <= 1e-5
    # Near zero the slope of the pseudo-Huber distance changes within c of f − y
    torch.testing.assert_close(
        grad.double(), expected, rtol=1e-4, atol=1e-3 * expected.abs().max().item()
    )


def test_float64_computes_in_float64():
    case = make(dtypes=(torch.float64,) * 6)
    truths = (solver_oracle(case), *outputs_oracle(case).values())
    for found, truth in zip((case.solve(), *case.outputs()), truths, strict=True):
        assert found.dtype == torch.float64
        np.testing.assert_allclose(numbers(found), truth.value, rtol=1e-12, atol=1e-12)
    for name in LATENTS:
        mixed = make().map(Tensor.double, name)
        assert {x.dtype for x in mixed.outputs()} == {torch.float64}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["teacher", *LATENTS])
def test_non_finite_input_stays_in_its_sample(backend, device, where, bad):
    case = make(3, (2, 5), device=device)
    expected = (case.solve(), *case.outputs())
    getattr(case, where)[4, 1, 3] = bad  # the loser of pair 1, and its conditional prediction
    healthy = torch.tensor([True, True, True, True, False, True], device=device)
    found = (case.solve(), *case.outputs())
    touched = {
        "teacher": [0],
        "noisy": [0, 1, 2],
        "policy": [1],
        "reference": [2],
        "target": [3],
        "previous": [3],
    }[where]
    for index, (result, right) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(result[healthy], right[healthy])
        assert result[4].isfinite().all() == (index not in touched)


# -------------------------------------------------------------------------------------- diffusers


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_solver_step_is_that_of_ddim_scheduler(backend, device, prediction):
    scheduler = DDIMScheduler(
        **SCHEDULE, prediction_type=prediction, set_alpha_to_one=False, clip_sample=False
    )
    scheduler.alphas_cumprod = torch.from_numpy(ALPHAS_CUMPROD)
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(50)
    case = make(3, timesteps=[19, 459, 999], prediction=prediction, device=device)
    truth = solver_oracle(case)
    expected = np.empty_like(truth.value)
    x, teacher = case.noisy.double().cpu(), case.teacher.double().cpu()
    for row in range(6):
        t, w = case.now.timesteps[row % 3].item(), case.guidance[row % 3].item()
        guided = teacher[row] + w * (teacher[row] - teacher[6 + row])
        expected[row] = scheduler.step(guided, t, x[row], eta=0.0).prev_sample.numpy()
    # alpha and sigma are rounded to float32 here, and not there: four roundings more
    check(case.solve(), Truth(expected, truth.size), roundings=14)


def test_scalings_are_those_of_lcm_scheduler(backend, device):
    scheduler = LCMScheduler(**SCHEDULE)
    case = make(4, timesteps=[0, 1, 19, 999], prediction="sample", device=device)
    found = case.outputs()
    for pair, t in enumerate(case.now.timesteps.tolist()):
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(t)
        x, output = numbers(case.noisy[pair]), numbers(case.policy[pair])
        value = c_skip * x + c_out * output
        check(found.policy[pair], Truth(value, c_skip * np.abs(x) + c_out * np.abs(output)))


# ------------------------------------------------------------------------------ gradient, autograd


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_gradcheck(prediction):
    case = make(2, (2, 3), (torch.float64,) * 6, prediction=prediction, timesteps=[0, 499])

    def function(policy: Tensor) -> Tensor:
        return case._replace(policy=policy).outputs().policy

    assert torch.autograd.gradcheck(function, case.policy.requires_grad_())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_has_the_policys_dtype_and_leaves_grad_output_alone(backend, device, dtype):
    case = make(dtypes=(dtype,) * 6, device=device)
    grad_output = torch.randn(case.policy.shape, device=device)
    before = grad_output.clone()
    _, grad = case.outputs_and_grad(grad_output)
    _, twice = case.outputs_and_grad(2 * grad_output)
    assert torch.equal(grad_output, before)
    assert grad.dtype == dtype
    assert torch.equal(2 * grad, twice)


def test_only_the_policy_has_a_gradient(backend, device):
    case = make(device=device)
    leaves = [getattr(case, name).requires_grad_() for name in ("teacher", *LATENTS)]
    assert not case.solve().requires_grad
    found = case.outputs()
    assert [x.requires_grad for x in found] == [True, False, False]
    (found.policy.sum() + found.reference.sum() + found.target.sum()).backward()
    assert [x.grad is not None for x in leaves] == [x is case.policy for x in leaves]
