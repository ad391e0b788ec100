"""Latent consistency models as we drive them against the stock pipelines of diffusers."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from cdpo.engine.basics.errors import OutsideError, RecipeError
from cdpo.engine.basics.keyed import content_id
from cdpo.engine.models import fingerprint, load_backbone
from cdpo.engine.models.fingerprints import changed_parts
from cdpo.engine.models.latent_diffusion import LatentDiffusion, guidance_embedding
from cdpo.engine.recipe import Model
from diffusers import (
    DDIMScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from peft import LoraConfig
from pictures import noise, pixels
from pydantic import ValidationError
from refusals import refused
from safetensors.torch import load_file

CPU = torch.device("cpu")
PROMPTS = ["red apple", "house", "tree"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sd`, `sdxl`, an LCM of each as a UNet alone, one as a pipeline, and an LCM-LoRA."""
    folder = tmp_path_factory.mktemp("lcm")
    sd = tiny.pipeline()
    sd.save_pretrained(folder / "sd")
    tiny.lcm_unet().save_pretrained(folder / "unet")
    others = ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    # Read back: of a config in memory from_config replaces what was left at its default.
    schedule = DDIMScheduler.from_pretrained(folder / "sd" / "scheduler").config
    LatentConsistencyModelPipeline(
        **{name: sd.components[name] for name in others},
        unet=tiny.lcm_unet(),
        scheduler=LCMScheduler.from_config(schedule),
        requires_safety_checker=False,
    ).save_pretrained(folder / "pipeline")
    xl = tiny.xl_pipeline()
    xl.save_pretrained(folder / "sdxl")
    type(xl.unet).from_config(xl.unet.config, time_cond_proj_dim=10).save_pretrained(
        folder / "xl_unet"
    )
    torch.manual_seed(0)
    sd.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    sd.save_lora_weights(folder / "lora", unet_lora_layers=_lora_of(sd.unet))
    return folder


def _lora_of(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    return dict(convert_state_dict_to_diffusers(get_peft_model_state_dict(unet)))


def load(folder: Path, path: str = "sd", **keys: object) -> LatentDiffusion:
    named = {
        name: str(folder / value) if name in ("unet", "teacher", "lcm_lora") else value
        for name, value in keys.items()
    }
    spec = Model(backbone="lcm", path=str(folder / path), resolution=(16, 16), **named)
    return load_backbone(spec, CPU)


def generators(start: torch.Tensor) -> list[torch.Generator]:
    seeds = [content_id(row.numpy().tobytes().hex()) for row in start]
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("guidance", [1.0, 2.5, 8.0])
def test_images_are_those_of_the_stock_lcm_pipeline(folder, same_images, guidance):
    backbone = load(folder, unet="unet")
    found = backbone.sample(backbone.denoiser, PROMPTS, noise(3), steps=4, guidance=guidance)
    stock = LatentConsistencyModelPipeline.from_pretrained(folder / "pipeline")
    stock.set_progress_bar_config(disable=True)
    expected = stock(
        PROMPTS,
        latents=noise(3),
        generator=generators(noise(3)),
        num_inference_steps=4,
        guidance_scale=guidance,
        height=16,
        width=16,
    ).images
    same_images("lcm", stock, 4, pixels(expected), pixels(found), most=1)


def test_images_of_an_lcm_sdxl_are_those_of_the_stock_pipeline(folder, same_images):
    backbone = load(folder, "sdxl", unet="xl_unet")
    found = backbone.sample(backbone.denoiser, PROMPTS, noise(3), steps=2, guidance=3.0)
    stock = StableDiffusionXLPipeline.from_pretrained(
        folder / "sdxl", unet=type(backbone.denoiser).from_pretrained(folder / "xl_unet")
    )
    stock.scheduler = LCMScheduler.from_config(stock.scheduler.config)
    stock.set_progress_bar_config(disable=True)
    options = {
        "latents": noise(3),
        "generator": generators(noise(3)),
        "height": 16,
        "width": 16,
    }
    expected = stock(PROMPTS, num_inference_steps=2, guidance_scale=3.0, **options).images
    same_images("lcm", stock, 2, pixels(expected), pixels(found), most=1)


def test_an_image_is_the_same_in_whatever_batch_it_is_drawn(folder):
    """The sampler adds noise between its steps: that too belongs to the image."""
    backbone = load(folder, unet="unet")
    together = backbone.sample(backbone.denoiser, PROMPTS, noise(3), steps=3, guidance=2.0)
    last = backbone.sample(backbone.denoiser, PROMPTS[2:], noise(3)[2:], steps=3, guidance=2.0)
    assert np.abs(pixels(together)[2:].astype(int) - pixels(last)).max() <= 1


def test_guidance_embedding_is_that_of_diffusers():
    pipeline = tiny.pipeline()
    w = torch.tensor([0.0, 1.5, 7.25, 14.0])
    for width in (10, 255, 256):
        expected = pipeline.get_guidance_scale_embedding(w, embedding_dim=width)
        torch.testing.assert_close(guidance_embedding(w, width), expected, rtol=0, atol=2e-3)


def test_the_guidance_weight_reaches_the_consistency_model_and_not_the_teacher(folder):
    backbone = load(folder, unet="unet")
    teacher = backbone.load_teacher()
    told = backbone.encode_prompts(PROMPTS)
    timesteps = torch.tensor([19, 499, 999])

    def predict(net: torch.nn.Module, w: float) -> torch.Tensor:
        guided = told.with_extras(guidance=torch.full((3,), w))
        return backbone.predict(net, noise(3), timesteps, guided)

    with torch.no_grad():
        assert not torch.equal(predict(backbone.denoiser, 1.0), predict(backbone.denoiser, 9.0))
        assert torch.equal(predict(teacher, 1.0), predict(teacher, 9.0))
        expected = backbone.denoiser(
            noise(3),
            timesteps,
            encoder_hidden_states=told.text,
            timestep_cond=tiny.pipeline().get_guidance_scale_embedding(torch.full((3,), 9.0), 10),
        ).sample
        torch.testing.assert_close(predict(backbone.denoiser, 9.0), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("path", "keys"),
    [("sd", {"unet": "unet"}), ("sd", {"lcm_lora": "lora"}), ("pipeline", {"teacher": "sd"})],
    ids=["unet", "lora", "pipeline"],
)
def test_the_teacher_is_the_diffusion_model(folder, path, keys):
    backbone = load(folder, path, **keys)
    teacher = backbone.load_teacher()
    stock = StableDiffusionPipeline.from_pretrained(folder / "sd").unet
    for name, value in stock.state_dict().items():
        assert torch.equal(teacher.state_dict()[name], value)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher.training


def test_an_lcm_lora_is_merged_once(folder):
    backbone = load(folder, lcm_lora="lora")
    stock = StableDiffusionPipeline.from_pretrained(folder / "sd")
    before = stock.unet.state_dict()
    after = backbone.denoiser.state_dict()
    assert set(after) == set(before)  # a plain UNet: an adapter of ours can be added
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("to_q" in name or "to_v" in name for name in changed)
    stock.load_lora_weights(folder / "lora")
    told = backbone.encode_prompts(PROMPTS)
    with torch.no_grad():
        expected = stock.unet(noise(3), 500, encoder_hidden_states=told.text).sample
        found = backbone.predict(backbone.denoiser, noise(3), torch.full((3,), 500), told)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_lcm_lora_is_a_part_of_its_own(folder, tmp_path):
    """Merged, the two are rounded otherwise on another processor."""
    parts = load(folder, lcm_lora="lora").fingerprints()
    plain = StableDiffusionPipeline.from_pretrained(folder / "sd")
    assert parts["model"] == fingerprint(plain.unet)
    other = {name: 2 * value for name, value in _lora_of_file(folder / "lora").items()}
    plain.save_lora_weights(tmp_path, unet_lora_layers=other)
    assert changed_parts(parts, load(folder, lcm_lora=tmp_path).fingerprints()) == ["lcm_lora"]


def _lora_of_file(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "pytorch_lora_weights.safetensors")
    return {name.removeprefix("unet."): value for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("path", "keys", "key", "kind"),
    [
        ("sd", {"lcm_lora": "unet"}, "model.lcm_lora", "unreadable"),
        ("unet", {}, "model.path", "unreadable"),
        ("nowhere", {}, "model.path", "unreadable"),
    ],
    ids=str,
)
def test_folders_that_hold_something_else(folder, path, keys, key, kind):
    with refused(OutsideError, kind, key):
        load(folder, path, **keys)


def test_networks_that_do_not_go_together(folder):
    with refused(OutsideError, "unsupported", "model.path"):
        load(folder, "sd")
    with refused(OutsideError, "contradiction", "model.lcm_lora"):
        load(folder, "pipeline", lcm_lora="lora")


def test_teachers_that_cannot_teach(folder):
    with refused(RecipeError, "missing", "model.teacher"):
        load(folder, "pipeline").load_teacher()
    with refused(OutsideError, "unsupported", "model.teacher"):
        load(folder, "pipeline", teacher="unet").load_teacher()
    with refused(OutsideError, "unreadable", "model.teacher"):
        load(folder, "pipeline", teacher="nowhere").load_teacher()


def test_the_lcm_pipeline_is_refused_by_the_family_of_diffusion_models(folder):
    spec = Model(backbone="sd", path=str(folder / "pipeline"), resolution=(16, 16))
    with refused(OutsideError, "unreadable", "model.path"):
        load_backbone(spec, CPU)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"backbone": "sd", "teacher": "x"}, "teacher belongs to backbone=lcm, not sd"),
        ({"backbone": "sdxl", "lcm_lora": "x"}, "lcm_lora belongs to backbone=lcm, not sdxl"),
        ({"backbone": "lcm", "unet": "x", "lcm_lora": "y"}, "give one of them"),
        ({"backbone": "lcm", "guidance_range": (5, 1)}, r"guidance_range=\[5, 1\] runs from high"),
    ],
    ids=str,
)
def test_keys_that_do_not_go_together(keys, message):
    with pytest.raises(ValidationError, match=message):
        Model(path="p", **keys)
