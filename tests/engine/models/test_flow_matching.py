"""The flow-matching process against its formulas in float64, and its draws against their laws."""

from collections.abc import Callable
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cdpo.engine.basics import keyed
from cdpo.engine.basics.errors import DataError
from cdpo.engine.basics.keyed import Stream
from cdpo.engine.models.flow_matching import FlowMatching, sigma_grid
from cdpo.engine.models.protocol import Draw
from cdpo.engine.objectives.weighting import timestep_weights
from cdpo.engine.recipe import Objective
from cdpo.engine.training.batch import refuse_foreign_shards
from diffusers import FlowMatchEulerDiscreteScheduler
from refusals import refused

CPU = torch.device("cpu")
SHAPE = (4, 6, 5)
TOKENS = 1024  # of an image of 512 x 512
MU = 0.5 + (1.15 - 0.5) * (TOKENS - 256) / (4096 - 256)
EVEN = np.arange(1, 1001) / 1000


def process(sigmas: str = "logit_normal", **config: object) -> FlowMatching:
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    return FlowMatching(scheduler, CPU, (512, 512), 16, sigmas)


def to_terminal(sigmas: np.ndarray, last: float) -> np.ndarray:
    """Stretched so that the least noise is ``last``."""
    return 1 - (1 - sigmas) * (1 - last) / (1 - sigmas[0])


# A scheduler's config, and the noise levels it stands for.
GRIDS = {
    "none": ({}, EVEN),
    "static": ({"shift": 3.0}, 3 * EVEN / (1 + 2 * EVEN)),
    "by size": (
        {"use_dynamic_shifting": True, "shift": 3.0},  # which then counts for nothing
        np.exp(MU) / (np.exp(MU) + 1 / EVEN - 1),
    ),
    "linear": (
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        MU / (MU + 1 / EVEN - 1),
    ),
    "terminal": (
        {"use_dynamic_shifting": True, "shift_terminal": 0.02},
        to_terminal(np.exp(MU) / (np.exp(MU) + 1 / EVEN - 1), 0.02),
    ),
}


@pytest.mark.parametrize("name", GRIDS)
def test_the_grid_has_the_schedulers_shift(name):
    config, expected = GRIDS[name]
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(7, mu=1.0)  # what was sampled meanwhile changes nothing
    np.testing.assert_allclose(sigma_grid(scheduler, TOKENS).double(), expected, rtol=0, atol=1e-6)
    assert process(**config).resolution == (
        (512, 512) if "use_dynamic_shifting" in config else None
    )
    ids = torch.arange(50)  # drawn from it, and not from that of another size
    drawn = process(**config).draw(0, ids, ids).timesteps.double().numpy() / 1000
    assert np.abs(drawn[:, None] - expected).min(axis=1).max() < 1e-6


def example(sigmas: tuple[float, ...] = (0.003, 0.25, 0.9, 1.0)) -> tuple[torch.Tensor, Draw]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2 * len(sigmas), *SHAPE, generator=generator)
    keys = keyed.make_keys(7, Stream.NOISE, range(len(sigmas)))
    return latents, Draw(1000 * torch.tensor(sigmas), keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_corruption_and_velocity_are_those_of_the_formulas(dtype):
    """x = (1 - sigma) x0 + sigma eps and u = eps - x0, winner and loser at one sigma and noise."""
    latents, draw = example()
    noise = keyed.normal(draw.noise_keys, SHAPE).double().repeat(2, 1, 1, 1)
    sigma = (draw.timesteps.double() / 1000).repeat(2)[:, None, None, None]
    noisy, target = process().corrupt(latents, draw, dtype)
    expected = (1 - sigma) * latents.double() + sigma * noise
    assert (noisy.dtype, target.dtype) == (dtype, torch.float32)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(noisy.double(), expected, rtol=eps, atol=1e-6)
    torch.testing.assert_close(target.double(), noise - latents.double(), rtol=0, atol=1e-6)


def test_the_clean_image_follows_as_the_stock_scheduler_finds_it():
    """Noise process and sampler agree on what the velocity is: its step to no noise is x0."""
    latents, draw = example()
    noisy, target = process().corrupt(latents, draw)
    for row, sigma in enumerate((draw.timesteps / 1000).repeat(2).tolist()):
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=[sigma])
        found = scheduler.step(target[row], scheduler.timesteps[0], noisy[row]).prev_sample
        torch.testing.assert_close(found, latents[row], rtol=0, atol=1e-5)


def _of_mode(x: np.ndarray) -> np.ndarray:
    """P(f(u) <= x), f falling: 1 less the u at which f is x."""
    u = np.linspace(0, 1, 100_001)
    f = 1 - u - 1.29 * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)
    return 1 - np.interp(-x, -f, u)


LAWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "logit_normal": lambda x: np.array([NormalDist().cdf(np.log(v / (1 - v))) for v in x]),
    "uniform": lambda x: x,
    "mode": _of_mode,
}


@pytest.mark.parametrize("sigmas", LAWS)
def test_noise_levels_follow_their_law_on_the_grid(sigmas):
    """Kolmogorov's distance at the law's steps, which is above this once in a thousand."""
    draws = 20_000
    ids = torch.arange(draws)
    times = process(sigmas, shift=3.0).draw(7, ids, torch.zeros_like(ids)).timesteps.double()
    assert times.min() > 0 and times.max() <= 1000
    shifted = times.numpy() / 1000
    even = shifted / (3 - 2 * shifted)  # the shift undone: k / 1000
    assert np.abs(even * 1000 - np.round(even * 1000)).max() < 1e-2
    edges = np.arange(1, 1000) / 1000
    shares = np.searchsorted(np.sort(np.round(even * 1000)), np.arange(1, 1000), "right") / draws
    assert np.abs(shares - LAWS[sigmas](edges)).max() < 1.95 / draws**0.5


def test_a_draw_hangs_on_seed_pair_and_visit_alone():
    noise, ids = process(), torch.tensor([11, 2**62, 5, 11])
    visits = torch.tensor([0, 3, 1, 1])
    whole = noise.draw(3, ids, visits)
    assert whole.timesteps.dtype == torch.float32 and len(whole.timesteps.unique()) == 4
    for row in range(4):
        alone = noise.draw(3, ids[row : row + 1], visits[row : row + 1])
        assert torch.equal(alone.timesteps, whole.timesteps[row : row + 1])
        assert torch.equal(alone.noise_keys, whole.noise_keys[row : row + 1])
    assert not torch.equal(noise.draw(4, ids, visits).timesteps, whole.timesteps)


@pytest.mark.parametrize("weight", ["epsilon", "x0"])
def test_weighted_velocities_are_errors_of_noise_or_image(weight):
    """Of two predictions the squared distance of what they say of noise or image."""
    latents, draw = example()
    noisy, target = (x.double() for x in process().corrupt(latents, draw))
    sigma = (draw.timesteps.double() / 1000).repeat(2)[:, None, None, None]
    one, other = target + 0.1, target * 0.5

    def says(u: torch.Tensor) -> torch.Tensor:
        return noisy + (1 - sigma) * u if weight == "epsilon" else noisy - sigma * u

    give = timestep_weights(Objective(time_weight=weight), process(), CPU)
    weights = give(draw.timesteps).double().repeat(2)
    found = weights * ((one - other) ** 2).flatten(1).mean(1)
    expected = ((says(one) - says(other)) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)
    assert timestep_weights(Objective(), process(), CPU) is None


def test_shards_of_another_size_are_refused_where_the_noise_hangs_on_it(tiny_recipe):
    shards = SimpleNamespace(kind="latents", resolution=(256, 256))
    backbone = SimpleNamespace(noise=process(use_dynamic_shifting=True))
    with refused(DataError, "mismatch", "model.resolution"):
        refuse_foreign_shards(tiny_recipe(), shards, backbone)
