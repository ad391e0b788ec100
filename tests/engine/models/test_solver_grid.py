"""The solver's grid: the published timesteps, guidance in its range, everything by key."""

import pytest
import torch
from cdpo.engine.basics.errors import RecipeError
from cdpo.engine.models.solver_grid import SolverGrid
from diffusers import LCMScheduler
from refusals import refused

CPU = torch.device("cpu")


def grid(steps: int = 50, guidance: tuple[float, float] = (5.0, 15.0)) -> SolverGrid:
    return SolverGrid(
        LCMScheduler(beta_schedule="scaled_linear"), CPU, solver_steps=steps, guidance=guidance
    )


def test_timesteps_and_their_successors_are_the_published_ones():
    ids = torch.arange(2000)
    draw = grid().draw(0, ids, torch.zeros_like(ids))
    assert draw.solver is not None
    now, earlier = draw.solver.now.timesteps, draw.solver.earlier.timesteps
    assert sorted(set(now.tolist())) == list(range(19, 1000, 20))  # all 50, and no others
    assert torch.equal(earlier, (now - 20).clamp(min=0))
    kept = LCMScheduler(beta_schedule="scaled_linear").alphas_cumprod
    torch.testing.assert_close(draw.solver.now.alpha, kept[now].sqrt())
    torch.testing.assert_close(draw.solver.earlier.sigma, (1 - kept[earlier]).sqrt())
    assert torch.equal(draw.timesteps, now)


@pytest.mark.parametrize("limits", [(5.0, 15.0), (0.0, 0.0), (1.0, 4.0)])
def test_guidance_fills_its_range(limits):
    ids = torch.arange(4000)
    guidance = grid(guidance=limits).draw(0, ids, torch.zeros_like(ids)).solver.guidance
    low, high = limits
    assert guidance.min() >= low and guidance.max() <= high
    assert guidance.mean().item() == pytest.approx((low + high) / 2, abs=0.03 * (high - low + 1e-9))


def test_a_pair_has_its_own_step_whatever_batch_it_is_in():
    ids, visits = torch.arange(20) * 7, torch.arange(20) % 3
    together = grid().draw(5, ids, visits)
    for row in range(20):
        alone = grid().draw(5, ids[row : row + 1], visits[row : row + 1])
        assert alone.timesteps == together.timesteps[row]
        assert alone.solver.guidance == together.solver.guidance[row]
        assert torch.equal(alone.noise_keys[0], together.noise_keys[row])


def test_noisy_latents_stay_float32():
    ids = torch.arange(2)
    made = grid()
    draw = made.draw(0, ids, torch.zeros_like(ids))
    noisy, _ = made.corrupt(torch.randn(4, 4, 8, 8).half(), draw, torch.bfloat16)
    assert noisy.dtype == torch.float32


@pytest.mark.parametrize("steps", [50, 1000])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_function_of_the_target_is_the_clean_latents(kind, steps):
    """At every timestep but 0, where no prediction counts and the target is 0."""
    scheduler = LCMScheduler(beta_schedule="scaled_linear", prediction_type=kind)
    made = SolverGrid(scheduler, CPU, solver_steps=steps, guidance=(1.0, 1.0))
    ids = torch.arange(200)
    draw, latents = made.draw(0, ids, torch.zeros_like(ids)), torch.randn(400, 1, 2, 2)
    noisy, target = made.corrupt(latents, draw)
    assert draw.solver is not None
    a, b = (torch.cat([x, x]).double()[:, None, None, None] for x in draw.solver.scales)
    found = a * noisy + b * target
    largest = ((a * noisy).abs() + (b * target).abs()).amax((1, 2, 3))
    at_0 = torch.cat([draw.timesteps] * 2) == 0
    assert ((found - latents).abs().amax((1, 2, 3)) <= 1e-6 * largest)[~at_0].all()
    assert at_0.any() == (steps == 1000)
    assert not target[at_0].any()


def test_steps_that_do_not_divide_the_schedule():
    with refused(RecipeError, "mismatch", "model.solver_steps"):
        grid(steps=30)
