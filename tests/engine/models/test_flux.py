"""FLUX.1 as we drive it against the stock pipeline of diffusers."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from cdpo.engine.basics.errors import OutsideError, RecipeError
from cdpo.engine.models.few_steps import check_guidance, describe_few_steps
from cdpo.engine.models.flow_matching import shift_exponent
from cdpo.engine.models.latent_diffusion import LatentDiffusion, packed, unpacked
from cdpo.engine.recipe import Recipe
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from flow_models import assert_fresh_and_learns, load_tiny
from pictures import noise, pixels
from refusals import refused

CPU = torch.device("cpu")
PROMPTS = ["red apple", "house"]
SIZES = {"dev": (16, 24), "schnell": (16, 16)}  # height and width of what is drawn


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dev` and `schnell` on disk: not to be written to."""
    folder = tmp_path_factory.mktemp("flux")
    for name in SIZES:
        tiny.flux_pipeline(dev=name == "dev").save_pretrained(folder / name)
    return folder


load = partial(load_tiny, backbone="flux", resolution=(16, 16))


def stepped(backbone: LatentDiffusion, start: torch.Tensor, steps: int) -> np.ndarray:
    """Pictures by our `predict`, the stock scheduler and the stock VAE alone."""
    own = backbone.pipeline.scheduler
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(own.config)
    tokens = start.shape[-2] * start.shape[-1] // 4
    scheduler.set_timesteps(
        sigmas=np.linspace(1.0, 1 / steps, steps), mu=shift_exponent(own, tokens)
    )
    told, latents = backbone.encode_prompts(PROMPTS), start
    with torch.no_grad():
        for time in scheduler.timesteps:
            answer = backbone.predict(backbone.denoiser, latents, time.expand(len(latents)), told)
            latents = scheduler.step(answer, time, latents).prev_sample
    return pixels(backbone.vae.decode(latents))


@pytest.mark.parametrize(("name", "guidance"), [("dev", 3.5), ("schnell", 1.0)])
def test_images_are_the_stock_pipelines_to_the_bit(folder, same_images, name, guidance):
    """By a loop over `predict`, and by `sample`, which ranks what users draw."""
    height, width = SIZES[name]
    backbone = load(folder / name, resolution=SIZES[name])
    stock = FluxPipeline.from_pretrained(folder / name)
    stock.set_progress_bar_config(disable=True)
    start = noise(2, height // 2, width // 2)
    expected = pixels(
        stock(
            PROMPTS,
            latents=stock._pack_latents(start, 2, 4, height // 2, width // 2),
            num_inference_steps=3,
            guidance_scale=guidance,
            height=height,
            width=width,
            max_sequence_length=512 if name == "dev" else 256,
        ).images
    )
    sampled = backbone.sample(backbone.denoiser, PROMPTS, start, steps=3, guidance=guidance)
    same_images("flux", stock, 3, expected, stepped(backbone, start, 3), pixels(sampled))


def test_latents_are_packed_as_the_stock_pipeline_packs_them():
    latents = torch.randn(2, 4, 6, 10)
    found = packed(latents)
    assert torch.equal(found, FluxPipeline._pack_latents(latents, 2, 4, 6, 10))
    assert torch.equal(unpacked(found, 6, 10), latents)


def test_training_tells_dev_its_guidance_and_schnell_none(folder):
    def says(name: str, **changes: object) -> torch.Tensor:
        backbone = load(folder / name, **changes)
        told = backbone.encode_prompts(PROMPTS)
        with torch.no_grad():
            return backbone.predict(backbone.denoiser, noise(2), torch.full((2,), 500.0), told)

    assert not torch.equal(says("dev"), says("dev", embedded_guidance=1.0))
    assert torch.equal(says("schnell"), says("schnell", embedded_guidance=1.0))


NO_GUIDANCE = ("prepare.sampler.guidance=1", "compare.sampler.guidance=1")


@pytest.mark.parametrize(
    ("knobs", "kind", "key"),
    [
        ((), "unsupported", "prepare.sampler.guidance"),
        (NO_GUIDANCE[:1], "unsupported", "compare.sampler.guidance"),
        (
            (*NO_GUIDANCE, "evaluate.sampler.guidance=2"),
            "unsupported",
            "evaluate.sampler.guidance",
        ),
        ((*NO_GUIDANCE, "model.embedded_guidance=2"), "no-effect", "model.embedded_guidance"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_guidance_for_a_model_that_takes_none_is_refused_where_it_is_written(
    folder, tmp_path, tiny_recipe, knobs, kind, key
):
    """Before weights are read, which are none here; the model that takes some is taken."""
    made = shutil.copytree(
        folder / "schnell", tmp_path / "made", ignore=shutil.ignore_patterns("*.safetensors")
    )
    recipe = tiny_recipe("model.backbone=flux", f"model.path={made}", *knobs)
    with refused(RecipeError, kind, key):
        check_guidance(recipe)
    check_guidance(tiny_recipe("model.backbone=flux", f"model.path={folder / 'dev'}", *knobs))
    check_guidance(tiny_recipe("model.backbone=flux", f"model.path={made}", *NO_GUIDANCE))


SFT = ("objective.type=sft",)


@pytest.mark.parametrize(
    ("backbone", "path", "embeds", "knobs", "count"),
    [
        ("flux", "some/model", False, SFT, 1),
        ("flux", "some/FLUX.1-dev", True, SFT, 0),
        ("sd3", "stabilityai/stable-diffusion-3.5-large-turbo", True, SFT, 1),
        ("sdxl", "stabilityai/sdxl-turbo/", True, SFT, 1),
        ("sdxl", "turbo/sdxl", True, SFT, 0),
        ("flux", "some/model", False, (), 0),
        ("flux", "some/model", False, ("objective.loser_gradient=0.5",), 1),
        ("flux", "some/model", False, ("objective.loser_safeguard=0.5",), 1),
        ("flux", "some/model", False, ("prepare.sampler.steps=28",), 1),
        ("flux", "some/model", False, ("compare.sampler.steps=28", *SFT), 2),
        ("flux", "some/FLUX.1-dev", True, ("compare.sampler.steps=28",), 0),
    ],
)
def test_what_undoes_a_distillation_to_few_steps_is_warned_of(
    tiny_recipe, backbone, path, embeds, knobs, count
):
    """It is known by its config, or by its name where that is one of what it was distilled from."""
    recipe = tiny_recipe(f"model.backbone={backbone}", f"model.path={path}", *knobs)
    found = describe_few_steps(recipe, {"guidance_embeds": embeds}, {})
    assert [name for name, _ in found] == ["warning"] * count


def test_a_consistency_model_has_losses_of_its_own(tiny_recipe):
    lcm = ("model.backbone=lcm", "model.path=some/sdxl-turbo", "model.teacher=some/sdxl")
    knobs = ("objective.type=consistency_dpo", "objective.loser_safeguard=0.5")
    assert not describe_few_steps(tiny_recipe(*lcm, *knobs), {}, {})


@pytest.mark.parametrize(
    ("knobs", "adapted"),
    [
        # q, k, v and out of image and text; q, k, v of both together; the rest of both blocks
        (("adapter.targets=attention+ff",), 8 + 3 + 4 + 2),
        (("adapter.dora=true",), 8 + 3),
        (("adapter.type=full", "export.formats=[merged]"), 0),
    ],
    ids=["lora", "dora", "full"],
)
def test_a_fresh_policy_is_its_reference_and_learns(
    folder: Path, tiny_recipe: Callable[..., Recipe], knobs: tuple[str, ...], adapted: int
) -> None:
    recipe = tiny_recipe("model.backbone=flux", f"model.path={folder / 'dev'}", *knobs)
    backbone = load(folder / "dev")
    assert_fresh_and_learns(recipe, backbone, PROMPTS, adapted)


def test_what_does_not_fit_is_refused(folder, tmp_path):
    with refused(OutsideError, "mismatch", "model.resolution"):
        load(folder / "dev", resolution=(16, 18))
    tiny.vae(latent_channels=8).save_pretrained(tmp_path)
    with refused(OutsideError, "mismatch", "model.vae"):
        load(folder / "dev", vae=str(tmp_path))
    other = shutil.copytree(folder / "dev", tmp_path / "other")
    for name, change, kind in (
        ("transformer/config.json", {"joint_attention_dim": 40}, "mismatch"),
        ("model_index.json", {"_class_name": "FluxKontextPipeline"}, "unreadable"),
    ):
        file = other / name
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        with refused(OutsideError, kind, "model.path") as told:
            load(other)
    assert "it holds a FluxKontextPipeline, which is not supported" in str(told.value)
