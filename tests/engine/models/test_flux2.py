"""FLUX.2 as we drive it against the stock pipelines of diffusers."""

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
from cdpo.engine.models import family_of
from cdpo.engine.models.few_steps import check_guidance, describe_few_steps
from cdpo.engine.models.fingerprints import fingerprints_of
from cdpo.engine.models.latent_diffusion import LatentDiffusion
from cdpo.engine.models.text import told_of_long
from cdpo.engine.recipe import Model, Recipe
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from flow_models import (
    as_users_load,
    assert_corrupted_to_velocities,
    assert_fresh_and_learns,
    load_tiny,
)
from pictures import noise, pixels
from refusals import refused
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ProcessorMixin

CPU = torch.device("cpu")
PROMPT = "red apple"
SIZE = (16, 24)  # height and width of what is drawn
MODELS = {
    "dev": {"dev": True},
    "klein-base": {"dev": False},
    "klein": {"dev": False, "distilled": True},
}
GUIDANCE = {"dev": 4.0, "klein-base": 3.0, "klein": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three on disk: not to be written to."""
    folder = tmp_path_factory.mktemp("flux2")
    for name, kind in MODELS.items():
        tiny.flux2_pipeline(**kind).save_pretrained(folder / name)
    return folder


load = partial(load_tiny, backbone="flux2", resolution=SIZE)


@pytest.fixture(scope="module")
def dev(folder: Path) -> LatentDiffusion:
    """For the tests that leave it as it is."""
    return load(folder / "dev")


def stepped(backbone: LatentDiffusion, start: Tensor, steps: int, guidance: float) -> np.ndarray:
    """A picture by our `predict`, the stock scheduler, its pipelines' shift and the VAE alone."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(backbone.pipeline.scheduler.config)
    mu = compute_empirical_mu(start.shape[-2] * start.shape[-1], steps)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    latents = start

    def says(prompt: str, time: Tensor) -> Tensor:
        told = backbone.encode_prompts([prompt])
        return backbone.predict(backbone.denoiser, latents, time.expand(1), told)

    twice = guidance > 1 and not backbone.denoiser.config.guidance_embeds
    with torch.no_grad():
        for time in scheduler.timesteps:
            answer = says(PROMPT, time)
            if twice:
                empty = says("", time)
                answer = empty + guidance * (answer - empty)
            latents = scheduler.step(answer, time, latents).prev_sample
    return pixels(backbone.vae.decode(latents))


@pytest.mark.parametrize("name", MODELS)
def test_images_are_the_stock_pipelines_to_the_bit(folder, same_images, name):
    """By a loop over `predict`, and by `sample`, which ranks what users draw."""
    guidance, start = GUIDANCE[name], noise(1, SIZE[0] // 2, SIZE[1] // 2)
    stock = DiffusionPipeline.from_pretrained(folder / name)
    stock.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "height": SIZE[0], "width": SIZE[1]}
    drawn = stock(prompt=PROMPT, latents=start, guidance_scale=guidance, **options)
    expected = pixels(drawn.images)
    backbone = load(folder / name, embedded_guidance=4.0)
    own = stepped(backbone, start, 3, guidance)
    sampled = backbone.sample(backbone.denoiser, [PROMPT], start, steps=3, guidance=guidance)
    same_images("flux2", stock, 3, expected, own, pixels(sampled))


def test_latents_are_patches_normalised_by_the_statistics_of_the_vae(dev):
    """Against the stock pipeline's own way to condition on an image, and float64."""
    images = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (2, 3, *SIZE), dtype=np.uint8)
    )
    found = dev.latents_of(dev.image_moments(images))
    given = images / 127.5 - 1
    assert torch.equal(found, dev.pipeline._encode_vae_image(given, None))
    assert found.shape[1:] == dev.latent_shape(SIZE) == (4, 8, 12)
    vae = dev.pipeline.vae
    with torch.no_grad():
        mean = vae.encode(given).latent_dist.mean.double()
    corners = [mean[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1)]
    shift, variance = (
        of.double().view(-1, 1, 1) for of in (vae.bn.running_mean, vae.bn.running_var)
    )
    expected = (torch.cat(corners, dim=1) - shift) / (variance + vae.config.batch_norm_eps).sqrt()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_corrupted_latents_and_targets(dev):
    assert_corrupted_to_velocities(dev, [PROMPT, "house"])


def test_training_tells_dev_its_guidance(folder, dev):
    other, times = load(folder / "dev", embedded_guidance=1.0), torch.full((1,), 500.0)
    with torch.no_grad():
        one, two = (
            of.predict(of.denoiser, noise(1), times, of.encode_prompts([PROMPT]))
            for of in (dev, other)
        )
    assert not torch.equal(one, two)


def test_what_the_encoder_does_not_see_is_counted(dev):
    assert told_of_long(dev, [PROMPT]) is None
    told = told_of_long(dev, ["red apple " * 60])  # a token is a byte here
    assert told is not None and "more than the 512 tokens" in told


@pytest.mark.parametrize(
    ("name", "knobs", "adapted"),
    [
        # q, k, v and out of image and text, the two of both together; the rest of the first block
        ("dev", ("adapter.targets=attention+ff",), 8 + 2 + 4),
        pytest.param("klein-base", (), 8 + 2, marks=pytest.mark.long),
        pytest.param("dev", ("adapter.dora=true",), 8 + 2, marks=pytest.mark.long),
        pytest.param(
            "dev", ("adapter.type=full", "export.formats=[merged]"), 0, marks=pytest.mark.long
        ),
    ],
    ids=["lora", "klein", "dora", "full"],
)
def test_a_fresh_policy_is_its_reference_and_learns(
    folder: Path,
    tiny_recipe: Callable[..., Recipe],
    name: str,
    knobs: tuple[str, ...],
    adapted: int,
) -> None:
    recipe = tiny_recipe("model.backbone=flux2", f"model.path={folder / name}", *knobs)
    assert_fresh_and_learns(recipe, load(folder / name), [PROMPT, "house"], adapted)


# What does not fit


def unread(folder: Path, made: Path) -> Path:
    """A copy without weights."""
    return shutil.copytree(folder, made, ignore=shutil.ignore_patterns("*.safetensors"))


NO_GUIDANCE = ("prepare.sampler.guidance=1", "compare.sampler.guidance=1")


@pytest.mark.parametrize(
    ("name", "knobs", "kind", "key"),
    [
        ("klein", (), "unsupported", "prepare.sampler.guidance"),
        ("klein", NO_GUIDANCE[:1], "unsupported", "compare.sampler.guidance"),
        (
            "klein",
            (*NO_GUIDANCE, "model.embedded_guidance=2"),
            "no-effect",
            "model.embedded_guidance",
        ),
        ("klein-base", ("model.embedded_guidance=2",), "no-effect", "model.embedded_guidance"),
    ],
)
def test_guidance_for_a_model_that_takes_none_is_refused_where_it_is_written(
    folder, tmp_path, tiny_recipe, name, knobs, kind, key
):
    """Before weights are read, which are none here."""
    made = unread(folder / name, tmp_path / "made")
    recipe = tiny_recipe("model.backbone=flux2", f"model.path={made}", *knobs)
    with refused(RecipeError, kind, key):
        check_guidance(recipe)


def test_guidance_is_for_dev_and_klein_base_and_a_distilled_klein_is_warned_of(folder, tiny_recipe):
    for name, knobs in (("dev", ("model.embedded_guidance=2",)), ("klein-base", ())):
        check_guidance(tiny_recipe("model.backbone=flux2", f"model.path={folder / name}", *knobs))
    for name, warned in (("dev", 0), ("klein-base", 0), ("klein", 1)):
        recipe = tiny_recipe("model.backbone=flux2", "model.path=some/model", "objective.type=sft")
        network = {"guidance_embeds": name == "dev"}
        found = describe_few_steps(recipe, network, {"is_distilled": name == "klein"})
        assert len(found) == warned


def test_sizes_text_and_folders_that_do_not_fit_are_refused(folder, tmp_path, dev):
    made = unread(folder / "klein", tmp_path / "made")
    for resolution in ((16, 17), (17, 16)):
        with refused(OutsideError, "mismatch", "model.resolution"):
            load(made, resolution=resolution)
    other = tmp_path / "vae"
    tiny.flux2_vae(latent_channels=2).save_pretrained(other)
    with refused(OutsideError, "mismatch", "model.vae"):
        load(made, vae=str(other))
    with refused(OutsideError, "unreadable", "model.path") as told:
        load(made, backbone="flux")
    assert "model.backbone=flux2 fits, not flux" in str(told.value)
    config = dict(dev.pipeline.transformer.config) | {"joint_attention_dim": 40}
    texts = {"text_encoder": dev.pipeline.text_encoder.config}
    with refused(OutsideError, "mismatch", "model.path"):
        family_of(Model(backbone="flux2", path="m")).check_text(
            Model(backbone="flux2", path="m"), config, texts
        )


def test_texts_are_read_without_what_the_processor_needs_for_pictures(dev, folder, tmp_path):
    """dev's own is Pixtral's, which needs torchvision; the tiny one's does not, so that the stock
    pipeline reads it.
    """
    made = shutil.copytree(folder / "dev", tmp_path / "made")
    file = made / "model_index.json"
    index = json.loads(file.read_text()) | {"tokenizer": ["transformers", "PixtralProcessor"]}
    file.write_text(json.dumps(index))
    own, stock = load(made), as_users_load(folder / "dev")
    assert isinstance(stock.tokenizer, ProcessorMixin)
    prompts = [PROMPT, "", "a cat [IMG] " * 100]
    found = [own.encode_prompts([prompt]).text for prompt in prompts]
    wanted = [stock.encode_prompt(prompt)[0] for prompt in prompts]
    assert all(map(torch.equal, found, wanted))
    assert fingerprints_of(own.pipeline)["text"] == fingerprints_of(dev.pipeline)["text"]


def test_a_vae_without_its_statistics_is_refused(folder, tmp_path):
    tiny.flux2_vae().save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    kept = {name: of for name, of in load_file(file).items() if not name.startswith("bn.")}
    save_file(kept, file, {"format": "pt"})
    with refused(OutsideError, "mismatch", "model.vae") as told:
        load(folder / "dev", vae=str(tmp_path))
    assert "bn.running_mean" in str(told.value) and "\n" not in str(told.value)
