"""Stable Diffusion 3 as we drive it against the stock pipeline of diffusers."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from cdpo.engine.basics.errors import OutsideError
from cdpo.engine.models import load_backbone
from cdpo.engine.models.flow_matching import shift_exponent
from cdpo.engine.models.latent_diffusion import LatentDiffusion
from cdpo.engine.models.text import told_of_long
from cdpo.engine.recipe import Model, Recipe
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
)
from flow_models import assert_fresh_and_learns, guided
from launching import losses
from pictures import noise, pixels
from refusals import refused
from safetensors.torch import load_file
from stock import assert_draws, levels_apart, stock_pipeline

CPU = torch.device("cpu")
PROMPTS = ["red apple", "house"]
T5 = ("text_encoder_3", "tokenizer_3")
SMALL_WORLD = tiny.ROOT / "assets" / "emoji" / "sd3"
# How a folder differs from the published ones, and the height and width of what is drawn.
KINDS = {
    "static shift": ({}, (16, 16)),
    "shift by size, no T5": (
        {"t5": False, "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)},
        (16, 24),
    ),
    "made without a T5": ({"t5": False, "text_width": 40}, (16, 16)),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 3 of each kind on disk: not to be written to."""
    folder = tmp_path_factory.mktemp("sd3")
    for kind, (changes, _) in KINDS.items():
        tiny.sd3_pipeline(**changes).save_pretrained(folder / kind)
    return folder


@pytest.fixture(scope="module")
def folder(folders: Path, kind: str) -> Path:
    return folders / kind


@pytest.fixture(scope="module")
def plain(folders: Path) -> Path:
    """With a T5."""
    return folders / "static shift"


@pytest.fixture(scope="module")
def shared(folder: Path, kind: str) -> LatentDiffusion:
    """One backbone for the tests that leave it as it is."""
    return load(folder, resolution=KINDS[kind][1])


@pytest.fixture(scope="module")
def stock(folder: Path) -> StableDiffusion3Pipeline:
    """The same model as a user loads it."""
    absent = {} if (folder / "text_encoder_3").exists() else dict.fromkeys(T5)
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def tokens(kind: str) -> dict[str, int]:
    """What a stock call is told where it would add zeros that the transformer never saw."""
    return {"max_sequence_length": 0} if kind == "made without a T5" else {}


def load(folder: Path, precision: str = "fp32", **changes: object) -> LatentDiffusion:
    spec = Model(**{"backbone": "sd3", "path": str(folder), "resolution": (16, 16)} | changes)
    return load_backbone(spec, CPU, precision)


def stepped(
    shared: LatentDiffusion, start: torch.Tensor, steps: int, guidance: float
) -> np.ndarray:
    """Pictures by our `predict`, the stock scheduler and the stock VAE alone."""
    own = shared.pipeline.scheduler
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(own.config)
    tokens = start.shape[-2] * start.shape[-1] // 4
    mu = shift_exponent(own, tokens) if own.config.use_dynamic_shifting else None
    scheduler.set_timesteps(steps, mu=mu)
    return guided(shared, scheduler, PROMPTS, start, guidance)


def test_images_are_the_stock_pipelines_to_the_bit(shared, stock, same_images, kind, tokens):
    """By a loop over `predict`, and by `sample`, which ranks what users draw."""
    height, width = KINDS[kind][1]
    start = noise(2, height // 2, width // 2)
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, "height": height, "width": width}
    expected = pixels(stock(PROMPTS, latents=start, **options, **tokens).images)
    sampled = shared.sample(shared.denoiser, PROMPTS, start, steps=3, guidance=3.0)
    same_images("sd3", stock, 3, expected, stepped(shared, start, 3, 3.0), pixels(sampled))


def test_the_small_world_has_one_that_the_stock_pipeline_draws_as_we_do():
    """In half precision, made without a T5, its transformer of 9 MB at most."""
    file = SMALL_WORLD / "transformer" / "diffusion_pytorch_model.safetensors"
    assert {weight.dtype for weight in load_file(file).values()} == {torch.float16}
    assert file.stat().st_size <= 9e6
    stock = StableDiffusion3Pipeline.from_pretrained(
        SMALL_WORLD, dtype=torch.float32, **dict.fromkeys(T5)
    )
    stock.set_progress_bar_config(disable=True)
    ours = load(SMALL_WORLD, resolution=(32, 32))
    start = noise(2, 8, 8)
    options = {"num_inference_steps": 2, "guidance_scale": 2.0, "max_sequence_length": 0}
    expected = pixels(stock(PROMPTS, latents=start, **options).images)
    found = pixels(ours.sample(ours.denoiser, PROMPTS, start, steps=2, guidance=2.0))
    assert levels_apart(found, expected) <= 1  # prompts are embedded in other rows
    assert expected.std() > 10


def test_prompts_are_embedded_as_the_stock_pipeline_does(shared, stock, tokens):
    prompts = [*PROMPTS, "", "a very long prompt " * 40]
    text, _, pooled, _ = stock.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, **tokens
    )
    found = shared.encode_prompts(prompts)
    torch.testing.assert_close(found.text, text, rtol=0, atol=5e-5)  # other rows, other rounding
    torch.testing.assert_close(found.extras["pooled_projections"], pooled, rtol=0, atol=1e-6)


def test_prompts_are_long_where_no_encoder_sees_their_end(shared, stock):
    """A T5 sees 256 tokens, here letters, where the CLIPs of `tiny` see 24."""
    most = 24 if stock.text_encoder_3 is None else 256
    assert told_of_long(shared, ["red apple " * 8]) is None
    told = told_of_long(shared, ["red apple " * 40])
    assert told is not None and f"more than the {most} tokens" in told


def test_latents_are_shifted_and_scaled_as_the_vae_says(shared, stock):
    images = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16), dtype=np.uint8)
    )
    with torch.no_grad():
        mean = stock.vae.encode(images / 127.5 - 1).latent_dist.mean
    found = shared.latents_of(shared.image_moments(images))
    torch.testing.assert_close(found, (mean - 0.1) * 0.5, rtol=0, atol=1e-5)


# Training


@pytest.mark.parametrize(
    ("knobs", "adapted"),
    [
        # q, k, v and out of image, text (whose last block has no out) and second attention
        (("adapter.targets=attention+ff",), 8 + 7 + 4 + 2 * 2 + 2),
        (("adapter.dora=true", "objective.time_weight=epsilon"), 8 + 7 + 4),
        (("adapter.type=full", "export.formats=[merged]"), 0),
    ],
    ids=["lora", "dora", "full"],
)
def test_a_fresh_policy_is_its_reference_and_learns(
    plain: Path, tiny_recipe: Callable[..., Recipe], knobs: tuple[str, ...], adapted: int
) -> None:
    recipe = tiny_recipe("model.backbone=sd3", f"model.path={plain}", *knobs)
    backbone = load(plain)
    assert_fresh_and_learns(recipe, backbone, PROMPTS, adapted)


@pytest.mark.slow
def test_a_run_and_what_the_stock_pipeline_draws_of_it(plain, world, tmp_path):
    """On the shards of Stable Diffusion, as it has its VAE."""
    vae = world.folder / "sd" / "vae"
    knobs = (
        *("model.backbone=sd3", f"model.path={plain}", f"model.vae={vae}", "model.sigmas=mode"),
        *("objective.beta=100", "adapter.targets=attention+ff", "train.optimizer.lr=2e-2"),
    )
    outcome = world.train(tmp_path, *knobs, "train.steps=4", "train.sample_every=4").succeeded()
    found = losses(tmp_path)
    assert found[0] == pytest.approx(math.log(2), abs=1e-6) and len(set(found)) == 4
    assert "100 of means, 0.391 of sums over 256 numbers" in outcome.text
    assert not (tmp_path / "lora" / "kohya.safetensors").exists()
    unshifted = AutoencoderKL.from_pretrained(vae, shift_factor=0.0)  # the pipeline wants a number
    stock = stock_pipeline(plain, tmp_path, "lora", vae=unshifted)
    assert_draws(stock, tmp_path, step=4)


# What does not fit


def broken(folder: Path, made: Path, **parts: object) -> Path:
    """A copy with other parts, in which no weights are to be read."""
    shutil.copytree(folder, made)
    for name, part in parts.items():
        shutil.rmtree(made / name)
        part.save_pretrained(made / name)
    for file in made.glob("*/*.safetensors"):
        file.write_bytes(b"not to be read")
    return made


def test_sizes_are_refused_before_weights_are_read(tmp_path, plain):
    path = broken(plain, tmp_path / "broken")
    for resolution in ((16, 18), (16, 52)):  # off the steps of 4; more than 12 patches
        with refused(OutsideError, "mismatch", "model.resolution") as told:
            load(path, resolution=resolution)
        assert "\n" not in str(told.value)


def test_a_vae_of_other_latents_is_refused_before_weights_are_read(tmp_path, plain):
    path = broken(plain, tmp_path / "broken", vae=tiny.vae(latent_channels=8))
    with refused(OutsideError, "mismatch", "model.path"):
        load(path)
    tiny.vae(latent_channels=8).save_pretrained(tmp_path / "vae")
    with refused(OutsideError, "mismatch", "model.vae"):
        load(path, vae=str(tmp_path / "vae"))


def rewritten(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("file", "change", "kind"),
    [
        ("transformer/config.json", {"joint_attention_dim": 40}, "mismatch"),
        ("transformer/config.json", {"pooled_projection_dim": 20}, "mismatch"),
        ("text_encoder_3/config.json", {"d_model": 56}, "mismatch"),
        ("model_index.json", {"text_encoder_2": [None, None]}, "unsupported"),
        ("model_index.json", {"scheduler": ["diffusers", "DDIMScheduler"]}, "unsupported"),
        ("scheduler/scheduler_config.json", {"stochastic_sampling": True}, "unsupported"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_text_and_sampler_are_refused_before_weights_are_read(tmp_path, plain, file, change, kind):
    """Widths that do not fit, no CLIP, a sampler that is none of flows or adds unseeded noise."""
    path = broken(plain, tmp_path / "broken")
    rewritten(path / file, **change)
    with refused(OutsideError, kind, "model.path"):
        load(path)


def test_another_transformer_takes_the_place_of_the_models_own(tmp_path, plain):
    tiny.sd3_pipeline(seed=5).transformer.save_pretrained(tmp_path)
    found = load(plain, "bf16", unet=str(tmp_path))
    assert found.denoiser.dtype == torch.bfloat16
    own, parts = load(plain).fingerprints(), found.fingerprints()
    assert parts["model"] != own["model"] and parts["noise"] == own["noise"]
