"""The Consistency-DPO step against a float64 oracle, plain PyTorch and diffusers."""

import math

import numpy as np
import pytest
import torch
from cdpo.kernels import SchedulePoint, consistency_scales, paired_dpo_loss, use
from consistency_cases import (
    ALPHAS_CUMPROD,
    LATENTS,
    PREDICTIONS,
    Case,
    Truth,
    clean_and_noise,
    make,
    numbers,
    schedule_point,
    slope_of,
    solver_oracle,
    targets_oracle,
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
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 4),
    out=st.sampled_from([None, *DTYPES]),
    prediction=st.sampled_from(PREDICTIONS),
    seed=st.integers(0, 1000),
)
def test_agrees_with_oracle(backend, device, pairs, shape, dtypes, out, prediction, seed):
    case = make(pairs, shape, dtypes, prediction=prediction, device=device, seed=seed)
    previous = case.solve(out)
    assert previous.dtype == (out or case.noisy.dtype)
    check(previous, solver_oracle(case))

    found = case.targets()
    assert found.dtype == torch.float32
    check(found, targets_oracle(case))


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


def typed_targets(case: Case) -> Tensor:
    """f at previous, solved for the prediction whose f at noisy is the same."""
    y = typed_function(case.previous, case.answer, case.earlier, case.prediction)
    nothing = torch.zeros_like(case.noisy)
    at_0 = typed_function(case.noisy, nothing, case.now, case.prediction)
    at_1 = typed_function(nothing, nothing + 1, case.now, case.prediction)
    return (y - at_0) / at_1


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loses_at_most_twice_what_plain_pytorch_loses(backend, device, dtype, prediction):
    case = make(4, (4, 24, 25), (dtype,) * 4, prediction=prediction, device=device)
    single = case.map(Tensor.float, "teacher", *LATENTS)
    found = (case.solve(), case.targets())
    typed = (typed_solver_step(single), typed_targets(single))
    truths = (solver_oracle(case), targets_oracle(case))
    for result, plain, truth in zip(found, typed, truths, strict=True):
        lost = np.abs(numbers(plain) - truth.value).max()
        ulp = torch.finfo(result.dtype).eps * np.abs(truth.value)
        assert lost > 0
        assert (np.abs(numbers(result) - truth.value) <= 2 * lost + ulp).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("shape", [(1,), (129,), (1023,), (2, 1025), (4, 33, 32)], ids=str)
def test_same_bits_as_pytorch(backend, device, shape, prediction):
    """At sizes around blocks; where the interpreter rounds: it truncates to bf16."""
    case = make(2, shape, (torch.float16,) * 4, prediction=prediction, device=device)
    found = [*(case.solve(dtype) for dtype in (None, torch.float32)), case.targets()]
    with use("torch"):
        expected = [*(case.solve(dtype) for dtype in (None, torch.float32)), case.targets()]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_same_bits_as_pytorch_at_every_timestep_of_the_solver(backend, device):
    case = make(50, (3,), timesteps=list(range(19, 1000, 20)), device=device)
    found = case.targets()
    with use("torch"):
        assert torch.equal(found, case.targets())


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_at_time_zero_the_answer_is_the_latents_themselves(backend, device, prediction):
    case = make(timesteps=[19, 5, 0], prediction=prediction, device=device)
    assert torch.equal(case.earlier.timesteps, torch.zeros_like(case.now.timesteps))
    answers = case.map(torch.zeros_like, "answer"), case
    assert torch.equal(*(each.targets() for each in answers))  # whatever was predicted
    assert case.scales.of_prediction[2] == 0 and case.scales.of_noisy[2] == 1
    assert not case.targets()[[2, 5]].any()  # nor does it count what is
    assert case.targets()[[0, 1, 3, 4]].all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identical_networks_have_logit_zero(backend, device, dtype, prediction):
    case = make(3, (4, 31, 17), (dtype,) * 4, prediction=prediction, device=device)
    options = {"distance": "pseudo_huber", "slopes": case.scales.of_prediction}
    result = paired_dpo_loss(case.answer, case.answer.clone(), case.targets(), 200.0, **options)
    assert (result.logits == 0).all()
    assert np.float32(result.loss.item()) == np.float32(math.log(2))
    cached = (case.answer, result.reference_error, case.targets())
    assert (paired_dpo_loss(*cached, 200.0, **options).logits == 0).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_whole_step_against_plain_float64(backend, device, prediction):
    """Solver, functions and loss in a row, to the gradient of the policy's prediction."""
    beta, c = 3.0, 1e-3
    case = make(2, (4, 9, 9), prediction=prediction, timesteps=[119, 699], device=device)
    generator = torch.Generator().manual_seed(1)
    policy, reference = (
        torch.randn(case.noisy.shape, generator=generator).to(device) for _ in range(2)
    )
    policy.requires_grad_()
    case = case._replace(previous=case.solve())
    result = paired_dpo_loss(
        *(policy, reference, case.targets(), beta),
        distance="pseudo_huber",
        slopes=case.scales.of_prediction,
    )
    (grad,) = torch.autograd.grad(result.loss, policy)

    exact = case.map(lambda x: x.detach().double(), "teacher", *LATENTS)
    exact = exact._replace(previous=typed_solver_step(exact))
    leaf = policy.detach().double().requires_grad_()
    f_policy, f_reference = (
        typed_function(exact.noisy, p, exact.now, prediction) for p in (leaf, reference.double())
    )
    y = typed_function(exact.previous, exact.answer, exact.earlier, prediction)
    d_policy, d_reference = (
        (((f - y) ** 2 + c**2).sqrt() - c).mean((1, 2, 3)) for f in (f_policy, f_reference)
    )
    winner, loser = (d_policy - d_reference).chunk(2)
    loss = -torch.nn.functional.logsigmoid(-beta * (winner - loser)).mean()
    (expected,) = torch.autograd.grad(loss, leaf)
    assert abs(result.loss.item() - loss.item()) <= 1e-5
    assert np.allclose(numbers(result.policy_error), numbers(d_policy), rtol=1e-5)
    # Near zero the slope of the pseudo-Huber distance changes within c of f − y
    torch.testing.assert_close(
        grad.double(), expected, rtol=1e-4, atol=1e-3 * expected.abs().max().item()
    )


def test_float64_computes_in_float64():
    case = make(dtypes=(torch.float64,) * 4)
    # The scales of `case` are rounded to float32, which is all that the target loses
    for found, truth, rtol in (
        (case.solve(), solver_oracle(case), 1e-12),
        (case.targets(), targets_oracle(case), 1e-6),
    ):
        assert found.dtype == torch.float64
        np.testing.assert_allclose(numbers(found), truth.value, rtol=rtol, atol=rtol * 10)
    for name in LATENTS:
        assert make().map(Tensor.double, name).targets().dtype == torch.float64


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["teacher", *LATENTS])
def test_non_finite_input_stays_in_its_sample(backend, device, where, bad):
    case = make(3, (2, 5), device=device)
    expected = (case.solve(), case.targets())
    getattr(case, where)[4, 1, 3] = bad  # the loser of pair 1, and its conditional prediction
    healthy = torch.tensor([True, True, True, True, False, True], device=device)
    found = (case.solve(), case.targets())
    touched = {"teacher": [0], "noisy": [0, 1], "answer": [1], "previous": [1]}[where]
    for index, (result, right) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(result[healthy], right[healthy])
        assert result[4].isfinite().all() == (index not in touched)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_scales_are_those_of_the_formula(prediction):
    point = schedule_point(torch.tensor([1, 19, 500, 999]))
    found = consistency_scales(point, prediction=prediction)
    assert {x.dtype for x in found} == {torch.float64}
    for pair, b in enumerate(found.of_prediction.tolist()):
        assert b == pytest.approx(slope_of([v[pair].item() for v in point], prediction), rel=1e-12)
    other = {"timestep_scaling": 0.3, "sigma_data": 1.3}
    a, b = consistency_scales(point, prediction="sample", **other)
    s = 0.3 * point.timesteps.double()
    torch.testing.assert_close(a, 1.3**2 / (s**2 + 1.3**2))
    torch.testing.assert_close(b, s / (s**2 + 1.3**2).sqrt())


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


def test_scales_are_those_of_lcm_scheduler():
    scheduler = LCMScheduler(**SCHEDULE)
    point = schedule_point(torch.tensor([0, 1, 19, 999]))
    for pair, (a, b) in enumerate(
        zip(*consistency_scales(point, prediction="sample"), strict=True)
    ):
        expected = scheduler.get_scalings_for_boundary_condition_discrete(point.timesteps[pair])
        assert (a.item(), b.item()) == pytest.approx([float(x) for x in expected], rel=1e-6)


def test_no_gradient_reaches_anything(backend, device):
    case = make(device=device)
    for name in ("teacher", *LATENTS):
        getattr(case, name).requires_grad_()
    assert not case.solve().requires_grad
    assert not case.targets().requires_grad
