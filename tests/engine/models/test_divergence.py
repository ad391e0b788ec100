"""The KL proxy against an independent computation with stock diffusers, in float64."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from cdpo.engine.basics import keyed
from cdpo.engine.basics.keyed import Stream, content_id
from cdpo.engine.models import lcm, sd, sdxl
from cdpo.engine.models.divergence import Divergence
from cdpo.engine.models.latent_diffusion import LatentDiffusion
from cdpo.engine.preparing.candidates import CandidateSet
from cdpo.engine.recipe.reading import load_recipe
from diffusers import UNet2DConditionModel
from PIL import Image

CPU = torch.device("cpu")
PROMPT, SEED, DRAWS = "red apple", 11, 3
LOADERS = {"sd": sd.load, "sdxl": sdxl.load, "lcm": lcm.load}


@pytest.fixture(scope="module", params=sorted(LOADERS))
def backbone(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> LatentDiffusion:
    folder = tmp_path_factory.mktemp(request.param)
    path = tiny.write_recipe(folder / "recipe.yaml", tiny.build(folder, request.param))
    return LOADERS[request.param](load_recipe(path).model, CPU, torch.float32)


@pytest.fixture
def base(tmp_path: Path) -> CandidateSet:
    images = CandidateSet(tmp_path, {"count": 2})
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    images.write(PROMPT, [Image.fromarray(picture) for picture in pixels])
    return images


def other_unet(backbone: LatentDiffusion, size: float) -> UNet2DConditionModel:
    """The backbone's denoiser with every weight moved a little."""
    other = UNet2DConditionModel.from_config(backbone.denoiser.config)
    other.load_state_dict(backbone.denoiser.state_dict())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in other.parameters():
            weight += size * torch.randn(weight.shape, generator=generator)
    return other.eval()


def measure(
    backbone: LatentDiffusion, base: CandidateSet, policy: torch.nn.Module, batch_size: int = 4
) -> np.ndarray:
    divergence = Divergence(
        backbone,
        backbone.denoiser,
        seed=SEED,
        draws=DRAWS,
        resolution=(16, 16),
        batch_size=batch_size,
    )
    return divergence.of(policy, PROMPT, backbone.encode_images(base.read(PROMPT)))


@torch.no_grad()
def stock(backbone: LatentDiffusion, base: CandidateSet, policy: UNet2DConditionModel) -> list:
    """Image by image and draw by draw, through the pipeline's own parts, in float64."""
    pipeline = backbone.pipeline
    scheduler = pipeline.scheduler
    answers = []
    for index, image in enumerate(base.read(PROMPT)):
        pixels = torch.from_numpy(np.asarray(image) / 127.5 - 1).permute(2, 0, 1)[None].float()
        mean = pipeline.vae.encode(pixels).latent_dist.mean.double()
        latents = mean * pipeline.vae.config.scaling_factor
        errors = []
        for draw in range(DRAWS):
            item = [content_id("divergence", PROMPT, str(index))]
            keys = {s: keyed.make_keys(SEED, s, item, [draw]) for s in Stream}
            consistent = "time_cond_proj_dim" in backbone.denoiser.config and (
                backbone.denoiser.config.time_cond_proj_dim is not None
            )
            step = keyed.integers(keys[Stream.TIMESTEP], 50 if consistent else 1000)
            timestep = (step + 1) * 20 - 1 if consistent else step
            noise = keyed.normal(keys[Stream.NOISE], (4, 8, 8)).double()
            abar = scheduler.alphas_cumprod[timestep].double()
            noisy = abar.sqrt() * latents + (1 - abar).sqrt() * noise
            known = dict(told(backbone))
            if consistent:
                w = 1.0 + 3.0 * keyed.uniform(keys[Stream.GUIDANCE])  # guidance_range [1, 4]
                known["timestep_cond"] = pipeline.get_guidance_scale_embedding(w, 10).double()
            outputs = [
                net.double()(noisy, timestep, return_dict=False, **known)[0]
                for net in (policy, backbone.denoiser)
            ]
            errors.append(float(((outputs[0] - outputs[1]) ** 2).mean()))
        answers.append(float(np.mean(errors)))
    return answers


def told(backbone: LatentDiffusion) -> dict:
    """What the stock pipeline tells its UNet of the prompt."""
    pipeline = backbone.pipeline
    encoded = pipeline.encode_prompt(
        PROMPT, device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    known = {"encoder_hidden_states": encoded[0].double()}
    if len(encoded) == 4:  # XL: also pooled text, and where the image was cut out
        ids = torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]], dtype=torch.float64)
        known["added_cond_kwargs"] = {"text_embeds": encoded[2].double(), "time_ids": ids}
    return known


def test_equals_the_stock_computation(backbone, base):
    policy = other_unet(backbone, 0.02)
    found = measure(backbone, base, policy)
    try:
        expected = stock(backbone, base, policy)
    finally:
        backbone.denoiser.float()
    assert found.shape == (2,) and found.min() > 1e-6
    assert found == pytest.approx(expected, rel=2e-3)


def test_base_is_at_zero_and_batches_do_not_matter(backbone, base):
    assert measure(backbone, base, backbone.denoiser).tolist() == [0.0, 0.0]
    policy = other_unet(backbone, 0.02)
    whole, single = (measure(backbone, base, policy, size) for size in (16, 1))
    assert whole == pytest.approx(single, rel=1e-3)


def test_grows_with_the_distance(backbone, base):
    near, far = (measure(backbone, base, other_unet(backbone, s)) for s in (0.01, 0.04))
    assert (far > 4 * near).all()
