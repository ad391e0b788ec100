"""Min-SNR weights against the formula, at its limits, and with their mean."""

import pytest
import torch
from cdpo.engine.objectives.weighting import min_snr_weights
from diffusers import DDIMScheduler
from diffusers.training_utils import compute_snr


def factors(**config: object) -> tuple[torch.Tensor, torch.Tensor]:
    kept = DDIMScheduler(beta_schedule="scaled_linear", **config).alphas_cumprod.double()
    return kept.sqrt(), (1 - kept).sqrt()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_against_the_formula_with_diffusers_snr(kind):
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    snr = compute_snr(scheduler, torch.arange(1000)).double()
    clipped = snr.clamp(max=5)
    expected = {"epsilon": clipped / snr, "v_prediction": clipped / (snr + 1), "sample": clipped}
    alpha, sigma = factors(beta_start=0.00085, beta_end=0.012)
    found = min_snr_weights(alpha, sigma, kind)
    wanted = expected[kind] / expected[kind].mean()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_no_signal_and_no_noise_have_finite_weights_and_the_mean_is_1(kind):
    alpha, sigma = factors(rescale_betas_zero_snr=True)
    alpha[-1], sigma[-1] = 0, 1
    alpha[0], sigma[0] = 1, 0
    weights = min_snr_weights(alpha, sigma, kind)
    assert weights.isfinite().all() and (weights >= 0).all()
    assert weights.mean().item() == pytest.approx(1, abs=1e-6)
    assert weights.dtype == torch.float32
