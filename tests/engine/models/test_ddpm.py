"""The discrete DDPM process against its formulas in float64, from the betas up."""

import numpy as np
import pytest
import torch
from cdpo.engine.basics import keyed
from cdpo.engine.basics.errors import OutsideError
from cdpo.engine.basics.keyed import Stream
from cdpo.engine.models.ddpm import DiscreteDDPM
from cdpo.engine.models.protocol import Draw
from diffusers import DDIMScheduler
from refusals import refused

CPU = torch.device("cpu")
SHAPE = (4, 6, 5)
START, END, NUM_TIMESTEPS = 0.00085, 0.012, 1000
SCHEDULES = [
    {"beta_schedule": "scaled_linear"},
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
]


def process(prediction_type: str = "epsilon", **config: object) -> DiscreteDDPM:
    config = {"beta_schedule": "scaled_linear"} | config
    scheduler = DDIMScheduler(
        beta_start=START, beta_end=END, prediction_type=prediction_type, **config
    )
    return DiscreteDDPM(scheduler, CPU)


def coefficients(config: dict[str, object]) -> tuple[np.ndarray, np.ndarray]:
    """sqrt(abar_t) and sqrt(1 - abar_t), (1000,) float64."""
    if config["beta_schedule"] == "linear":
        betas = np.linspace(START, END, NUM_TIMESTEPS)
    else:
        betas = np.linspace(START**0.5, END**0.5, NUM_TIMESTEPS) ** 2
    alpha = np.sqrt(np.cumprod(1 - betas))
    if config.get("rescale_betas_zero_snr"):  # Lin et al., arXiv 2305.08891, algorithm 1
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    return alpha, np.sqrt(1 - alpha**2)


def example(timesteps: tuple[int, ...] = (0, 1, 250, 500, 998, 999)) -> tuple[torch.Tensor, Draw]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2 * len(timesteps), *SHAPE, generator=generator)
    keys = keyed.make_keys(7, Stream.NOISE, range(len(timesteps)))
    return latents, Draw(torch.tensor(timesteps), keys)


def noise_of(draw: Draw) -> torch.Tensor:
    return keyed.normal(draw.noise_keys, SHAPE)


@pytest.mark.parametrize("config", SCHEDULES)
def test_corruption_is_that_of_the_schedule(config):
    latents, draw = example()
    alpha, sigma = (c[draw.timesteps][:, None, None, None] for c in coefficients(config))
    winners, losers = latents.double().numpy().reshape(2, 6, *SHAPE)
    noise = noise_of(draw).double().numpy()
    expected = np.concatenate([alpha * winners + sigma * noise, alpha * losers + sigma * noise])
    noisy, _ = process(**config).corrupt(latents, draw)
    assert noisy.dtype == torch.float32
    np.testing.assert_allclose(noisy.numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", SCHEDULES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_target_is_what_the_scheduler_says_the_network_predicts(config, prediction_type):
    """eps; v = sqrt(abar) eps - sqrt(1 - abar) x0; x0. Only eps is shared by winner and loser."""
    latents, draw = example()
    alpha, sigma = (c[draw.timesteps][:, None, None, None] for c in coefficients(config))
    winners, losers = latents.double().numpy().reshape(2, 6, *SHAPE)
    noise = noise_of(draw).double().numpy()
    expected = {
        "epsilon": noise,
        "v_prediction": np.concatenate(
            [alpha * noise - sigma * winners, alpha * noise - sigma * losers]
        ),
        "sample": np.concatenate([winners, losers]),
    }[prediction_type]
    _, target = process(prediction_type, **config).corrupt(latents, draw)
    assert target.dtype == torch.float32
    np.testing.assert_allclose(target.numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_clean_image_follows_from_corruption_and_target(prediction_type):
    """As DDIM recovers it: noise process and sampler agree on what the network predicts."""
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", prediction_type=prediction_type, clip_sample=False
    )
    scheduler.set_timesteps(1000)
    latents, draw = example()
    noisy, target = DiscreteDDPM(scheduler, CPU).corrupt(latents, draw)
    target = torch.cat([target, target]) if len(target) == len(draw.timesteps) else target
    for row, timestep in enumerate([*draw.timesteps.tolist()] * 2):
        step = scheduler.step(target[row], timestep, noisy[row])
        torch.testing.assert_close(step.pred_original_sample, latents[row], rtol=0, atol=1e-4)


def test_at_zero_terminal_snr_nothing_of_the_image_is_left():
    latents, draw = example((999,) * 6)
    noisy, target = process("v_prediction", rescale_betas_zero_snr=True).corrupt(latents, draw)
    assert torch.equal(noisy, torch.cat([noise_of(draw), noise_of(draw)]))
    assert torch.equal(target, -latents)


def test_a_last_alpha_of_almost_zero_keeps_what_it_says_of_the_image():
    """Some of diffusers' schedulers set it to 2**-24 where the rescaled betas give 0."""
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    scheduler.alphas_cumprod[-1] = 2**-24
    latents, draw = example((999,) * 6)
    noisy, target = DiscreteDDPM(scheduler, CPU).corrupt(latents, draw)
    alpha, sigma = 2.0**-12, (1 - 2.0**-24) ** 0.5
    noise = torch.cat([noise_of(draw), noise_of(draw)]).double()
    clean = latents.double()
    torch.testing.assert_close(noisy.double(), alpha * clean + sigma * noise, rtol=0, atol=1e-6)
    torch.testing.assert_close(target.double(), alpha * noise - sigma * clean, rtol=0, atol=1e-6)


def test_winner_and_loser_share_noise_and_timestep():
    latents, draw = example()
    same = torch.cat([latents[:6], latents[:6]])
    for values in process("v_prediction").corrupt(same, draw):
        winners, losers = values.chunk(2)
        assert torch.equal(winners, losers)


def test_half_precision_latents_are_corrupted_in_float32():
    latents, draw = example()
    half = latents.half()
    noise = process("v_prediction")
    plain, target = noise.corrupt(half.float(), draw)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = noise.corrupt(half, draw, dtype)
        assert torch.equal(found[0], plain.to(dtype)) and torch.equal(found[1], target)


def test_timesteps_cover_the_whole_range_evenly():
    draws = 20_000
    ids = torch.arange(draws)
    timesteps = process().draw(7, ids, torch.zeros_like(ids)).timesteps
    assert timesteps.dtype == torch.int64
    counts = np.bincount(timesteps.numpy(), minlength=1000)
    assert len(counts) == 1000 and counts.min() > 0
    expected = draws / 1000
    chi_square = float(((counts - expected) ** 2 / expected).sum())  # 999 +- 45 if uniform
    assert 999 - 5 * 45 < chi_square < 999 + 5 * 45


def test_noise_is_standard_normal():
    ids = torch.arange(200)
    noise = noise_of(process().draw(7, ids, torch.zeros_like(ids))).double()
    count = noise.numel()
    assert noise.shape == (200, *SHAPE)
    assert abs(noise.mean()) < 5 / count**0.5
    assert abs(noise.var() - 1) < 5 * (2 / count) ** 0.5


def test_a_draw_does_not_depend_on_who_shares_the_batch():
    noise = process()
    ids, visits = torch.tensor([11, 2**62, 5, 11]), torch.tensor([0, 3, 1, 1])
    whole = noise.draw(3, ids, visits)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = noise.draw(3, ids[order], visits[order])
    assert torch.equal(noise_of(shuffled), noise_of(whole)[order])
    assert torch.equal(shuffled.timesteps, whole.timesteps[order])
    for row in range(4):
        alone = noise.draw(3, ids[row : row + 1], visits[row : row + 1])
        assert torch.equal(noise_of(alone)[0], noise_of(whole)[row])
        assert alone.timesteps[0] == whole.timesteps[row]


def test_seed_pair_and_visit_each_give_another_draw():
    noise = process()
    ids = torch.arange(64)
    draws = [
        noise.draw(seed, ids + first, torch.full_like(ids, visit))
        for seed, first, visit in [(3, 0, 0), (4, 0, 0), (3, 64, 0), (3, 0, 1)]
    ]
    assert len({noise_of(draw)[0].sum().item() for draw in draws}) == 4
    assert len({tuple(draw.timesteps.tolist()) for draw in draws}) == 4


def test_noise_and_timestep_come_from_different_streams():
    """One stream for both would tie a pair's noise to its timestep."""
    ids = torch.arange(4000)
    draw = process().draw(3, ids, torch.zeros_like(ids))
    pairs = torch.stack([draw.timesteps.double(), noise_of(draw)[:, 0, 0, 0].double()])
    assert abs(torch.corrcoef(pairs)[0, 1]) < 5 / 4000**0.5


def test_a_prediction_type_we_do_not_know_is_refused():
    scheduler = DDIMScheduler()
    scheduler.register_to_config(prediction_type="flow_prediction")
    with refused(OutsideError, "unknown", "prediction_type"):
        DiscreteDDPM(scheduler, CPU)
