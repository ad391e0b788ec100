"""SANA as we drive it against the stock pipeline of diffusers."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from batches import corrupted
from cdpo.engine.basics.errors import OutsideError
from cdpo.engine.models import fingerprint
from cdpo.engine.models.latent_diffusion import LatentDiffusion
from cdpo.engine.models.text import told_of_long
from cdpo.engine.preparing.shard_tools.sheet import load_vae
from cdpo.engine.recipe import Recipe
from cdpo.engine.shards.manifest import VaeSource
from diffusers import SanaPipeline
from flow_models import assert_fresh_and_learns, guided, load_tiny
from pictures import noise, pixels
from refusals import refused

CPU = torch.device("cpu")
PROMPTS = ["red apple", "house"]
SIZE = (32, 64)  # height and width of what is drawn


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On disk: not to be written to."""
    folder = tmp_path_factory.mktemp("sana")
    tiny.sana_pipeline().save_pretrained(folder)
    return folder


load = partial(load_tiny, backbone="sana", resolution=SIZE)


@pytest.fixture(scope="module")
def shared(folder: Path) -> LatentDiffusion:
    """One backbone for the tests that leave it as it is."""
    return load(folder)


def stepped(
    shared: LatentDiffusion, start: torch.Tensor, steps: int, guidance: float
) -> np.ndarray:
    """Pictures by our `predict`, the stock scheduler and the stock VAE alone."""
    own = shared.pipeline.scheduler
    scheduler = type(own).from_config(own.config)
    scheduler.set_timesteps(steps)
    return guided(shared, scheduler, PROMPTS, start, guidance)


def test_images_are_the_stock_pipelines_to_the_bit(folder, shared, same_images):
    """By a loop over `predict`, and by `sample`, which ranks what users draw: prompts behind the
    pipeline's instruction, the empty one without, padding masked, and noise levels by the solver.
    """
    height, width = SIZE
    stock = SanaPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    start = noise(2, height // 4, width // 4)
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, "height": height, "width": width}
    drawn = stock(PROMPTS, latents=start, use_resolution_binning=False, **options).images
    expected = pixels(drawn)
    sampled = shared.sample(shared.denoiser, PROMPTS, start, steps=3, guidance=3.0)
    same_images("sana", stock, 3, expected, stepped(shared, start, 3, 3.0), pixels(sampled))


def test_prompts_are_long_beyond_what_is_kept_of_them(shared):
    """Letters, behind those of the instruction; padding of the empty prompt does not count."""
    assert told_of_long(shared, ["a" * 298]) is None
    told = told_of_long(shared, ["a" * 299])
    assert told is not None and "more than the 299 tokens" in told
    mask = shared.encode_prompts(["", "house"]).extras["encoder_attention_mask"]
    assert mask.sum(1).tolist() == [1, 2 + 5]  # a beginning, the instruction's last, letters


def test_noise_is_that_of_the_solver_and_its_target_the_velocity(shared):
    """Against the schedule's formula in float64: levels shifted by 3, noise minus latents."""
    levels = np.linspace(1, 1 / 1000, 1001)
    shifted = 3 * (1 - levels) / (1 + 2 * (1 - levels))
    grid = shared.noise._grid.double().numpy() / 1000
    assert len(grid) == 1000 and np.allclose(grid, shifted[1:], rtol=0, atol=2e-7)
    batch = corrupted(shared, PROMPTS)
    sigma = (batch.draw.timesteps / 1000).double()[:, None, None, None].repeat(2, 1, 1, 1)
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    eps = batch.target.double() + latents
    assert torch.allclose(eps[:2], eps[2:], atol=1e-6)  # of winner and loser
    expected = (1 - sigma) * latents + sigma * eps
    torch.testing.assert_close(batch.noisy.double(), expected, rtol=0, atol=1e-6)


def test_latents_have_no_variance_and_the_vaes_scale(shared):
    images = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (2, 3, *SIZE), dtype=np.uint8)
    )
    with torch.no_grad():
        expected = shared.vae.vae.encode(images / 127.5 - 1).latent * 0.5
    moments = shared.image_moments(images)
    assert moments.shape == (2, 2 * 4, 8, 16)
    for drawn in (None, noise(2, 8, 16)):
        found = shared.latents_of(moments, drawn)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_sheet_of_a_set_is_decoded_by_the_autoencoder_that_it_was_made_with(folder, shared):
    own = shared.vae.vae
    source = VaeSource(path=str(folder), fingerprint=fingerprint(own), scaling_factor=0.5)
    assert type(load_vae(source).vae) is type(own)


@pytest.mark.parametrize(
    ("knobs", "adapted"),
    [
        # q, k, v and out of both attentions, and two of three convolutions, in two blocks
        (("adapter.targets=attention+ff",), 2 * (8 + 2)),
        pytest.param(("adapter.dora=true",), 2 * 8, marks=pytest.mark.long),
        pytest.param(("adapter.type=full", "export.formats=[merged]"), 0, marks=pytest.mark.long),
    ],
    ids=["lora", "dora", "full"],
)
def test_a_fresh_policy_is_its_reference_and_learns(
    folder: Path, tiny_recipe: Callable[..., Recipe], knobs: tuple[str, ...], adapted: int
) -> None:
    size = "model.resolution=[32,32]"
    recipe = tiny_recipe("model.backbone=sana", f"model.path={folder}", size, *knobs)
    backbone = load(folder)
    assert_fresh_and_learns(recipe, backbone, PROMPTS, adapted)


@pytest.mark.parametrize(
    ("file", "change", "kind", "told"),
    [
        ("model_index.json", {"_class_name": "SanaSprintPipeline"}, "unreadable", "not supported"),
        ("transformer/config.json", {"guidance_embeds": True}, "unsupported", "SANA-Sprint"),
        ("transformer/config.json", {"caption_channels": 24}, "mismatch", "caption_channels=24"),
        ("vae/config.json", {"latent_channels": 8}, "mismatch", "latent_channels=8"),
        ("scheduler/scheduler_config.json", {"use_flow_sigmas": False}, "unsupported", "flow"),
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}, "unsupported", "karras"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_does_not_fit_is_refused_before_weights_are_read(
    folder, tmp_path, file, change, kind, told
):
    made = shutil.copytree(folder, tmp_path / "made")
    for weights in made.glob("*/*.safetensors"):
        weights.write_bytes(b"not to be read")
    path = made / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with refused(OutsideError, kind, "model.path") as found:
        load(made)
    assert told in str(found.value) and "\n" not in str(found.value)


def test_other_sizes_and_backbones_are_refused(folder):
    with refused(OutsideError, "mismatch", "model.resolution"):
        load(folder, resolution=(32, 34))
    with refused(OutsideError, "unreadable", "model.path") as told:
        load(folder, backbone="sd3")
    assert "model.backbone=sana fits" in str(told.value)
