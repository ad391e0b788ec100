"""Qwen-Image 2.1 as we drive it against the stock pipeline of diffusers."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from cdpo.engine.basics.errors import OutsideError
from cdpo.engine.models import family_of
from cdpo.engine.models.flow_matching import shift_exponent
from cdpo.engine.models.latent_diffusion import LatentDiffusion
from cdpo.engine.models.text import told_of_long
from cdpo.engine.recipe import Model, Recipe
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from flow_models import (
    as_users_load,
    assert_corrupted_to_velocities,
    assert_fresh_and_learns,
    load_tiny,
)
from pictures import noise, pixels
from refusals import refused
from stock import levels_apart
from torch import Tensor

CPU = torch.device("cpu")
PROMPTS = ["red apple", "a house by the sea, and behind it mountains with snow"]
SIZE = (128, 192)  # height and width of what is drawn, 16 times those of latents
OWN = [1.0, 0.7, 0.2]  # noise levels that a folder may bring, as that of Turbo does


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk: not to be written to."""
    folder = tmp_path_factory.mktemp("own") / "qwen_image21"
    tiny.qwen_image21_pipeline().save_pretrained(folder)
    return folder


load = partial(load_tiny, backbone="qwen_image21", resolution=SIZE)


@pytest.fixture(scope="module")
def shared(folder: Path) -> LatentDiffusion:
    """One backbone for the tests that leave it as it is."""
    return load(folder)


@pytest.fixture(scope="module")
def stock(folder: Path) -> DiffusionPipeline:
    """The same model as a user loads it."""
    return as_users_load(folder)


def each(draw: Callable[[str, Tensor], Any]) -> np.ndarray:
    """Pictures of prompts, drawn one by one: the VAE rounds a batch otherwise."""
    start = noise(2, SIZE[0] // 16, SIZE[1] // 16).split(1)
    return np.concatenate([draw(*of) for of in zip(PROMPTS, start, strict=True)])


def drawn(stock: DiffusionPipeline, guidance: float) -> np.ndarray:
    """By the stock pipeline, without what it makes of alpha."""
    options = {"num_inference_steps": 3, "height": SIZE[0], "width": SIZE[1]}
    own = {"true_cfg_scale": guidance, "negative_prompt": " " if guidance > 1 else None}
    return each(
        lambda prompt, start: pixels(
            stock(prompt, latents=start.flatten(2).mT, **options, **own).images
        )[..., :3]
    )


def sampled(of: LatentDiffusion, guidance: float, steps: int = 3) -> np.ndarray:
    return each(
        lambda prompt, start: pixels(
            of.sample(of.denoiser, [prompt], start, steps=steps, guidance=guidance)
        )
    )


def stepped(of: LatentDiffusion, guidance: float, levels: Any) -> np.ndarray:
    return each(lambda prompt, start: loop(of, prompt, start, guidance, levels))


def loop(
    shared: LatentDiffusion, prompt: str, start: Tensor, guidance: float, levels: Any
) -> np.ndarray:
    """By our `predict`, the stock scheduler and the VAE alone."""
    own = shared.pipeline.scheduler
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(own.config)
    scheduler.set_timesteps(sigmas=levels, mu=shift_exponent(own, start[0, 0].numel()))
    latents = start

    def says(prompt: str, time: Tensor) -> Tensor:
        told = shared.encode_prompts([prompt])
        return shared.predict(shared.denoiser, latents, time.expand(1), told)

    with torch.no_grad():
        for time in scheduler.timesteps:
            answer = says(prompt, time)
            if guidance > 1:
                nothing = says("", time)
                answer = nothing + guidance * (answer - nothing)
            latents = scheduler.step(answer, time, latents).prev_sample
    return pixels(shared.vae.decode(latents))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_images_are_the_stock_pipelines_to_the_bit(shared, stock, same_images, guidance):
    """By a loop over `predict`, and by `sample`, which ranks what users draw."""
    expected, own = drawn(stock, guidance), stepped(shared, guidance, np.linspace(1.0, 1 / 3, 3))
    same_images("qwen_image21", stock, 3, expected, own, sampled(shared, guidance))
    start = noise(2, SIZE[0] // 16, SIZE[1] // 16)
    both = shared.sample(shared.denoiser, PROMPTS, start, steps=3, guidance=guidance)
    assert levels_apart(pixels(both), expected) <= 1


def test_noise_levels_of_the_folder_are_for_as_many_steps_as_they_are(folder, same_images):
    stock = DiffusionPipeline.from_pretrained(folder, sample_sigmas=OWN)
    stock.set_progress_bar_config(disable=True)
    stock.save_pretrained(made := folder.parent / "turbo")
    turbo = load(made)
    same_images("qwen_image21", stock, 3, drawn(stock, 1.0), sampled(turbo, 1.0))
    assert np.array_equal(sampled(turbo, 1.0), stepped(turbo, 1.0, OWN))
    assert np.array_equal(sampled(turbo, 1.0, steps=2), stepped(turbo, 1.0, [1.0, 0.5]))


def test_a_prompt_is_embedded_as_the_stock_pipeline_does_it_alone(shared, stock):
    """To the bit, whatever stands beside it and however long it is."""
    prompts = [*PROMPTS, "red apple " * 80]  # a token is a byte here
    told = shared.encode_prompts(prompts)
    for row, length, prompt in zip(told.text, told.lengths, prompts, strict=True):
        found, *_ = stock.encode_prompt([prompt], device=CPU)
        assert torch.equal(row[:length], found[0]) and not row[length:].any()
    assert told_of_long(shared, prompts) is None


def test_an_image_is_told_of_nothing_beside_it(shared):
    """To the bit: behind a longer text, its padding included, it would be another."""
    told, start = shared.encode_prompts(PROMPTS), noise(2)
    times = torch.tensor([900.0, 300.0])

    def says(*rows: int) -> Tensor:
        part = told.select(list(rows))
        return shared.predict(shared.denoiser, start[[*rows]], times[[*rows]], part)

    with torch.no_grad():
        assert torch.equal(says(0, 1), torch.cat([says(0), says(1)]))


def test_corrupted_latents_and_targets(shared):
    assert_corrupted_to_velocities(shared, PROMPTS)


def test_latents_are_those_of_opaque_images_normalised_a_channel_at_a_time(shared, stock):
    images = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (2, 3, *SIZE), dtype=np.uint8)
    )
    given = torch.cat([images / 127.5 - 1, torch.ones(2, 1, *SIZE)], dim=1)
    with torch.no_grad():
        mean = stock.vae.encode(given.unsqueeze(2)).latent_dist.mean[:, :, 0]
    shift, std = (
        torch.tensor(stock.vae.config[f"latents_{of}"]).double().view(-1, 1, 1)
        for of in ("mean", "std")
    )
    found = shared.latents_of(shared.image_moments(images))
    assert found.shape[1:] == shared.latent_shape(SIZE) == (4, 8, 12)
    torch.testing.assert_close(found.double(), (mean.double() - shift) / std, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("knobs", "adapted"),
    [
        (("adapter.targets=attention+ff",), 2 * (4 + 3)),
        pytest.param(("adapter.dora=true",), 2 * 4, marks=pytest.mark.long),
        pytest.param(("adapter.type=full", "export.formats=[merged]"), 0, marks=pytest.mark.long),
    ],
    ids=["lora", "dora", "full"],
)
def test_a_fresh_policy_is_its_reference_and_learns(
    folder: Path, tiny_recipe: Callable[..., Recipe], knobs: tuple[str, ...], adapted: int
) -> None:
    recipe = tiny_recipe("model.backbone=qwen_image21", f"model.path={folder}", *knobs)
    assert_fresh_and_learns(recipe, load(folder), PROMPTS, adapted)


# What does not fit


def unread(folder: Path) -> Path:
    """Its weights are not to be read."""
    for file in folder.glob("*/*.safetensors"):
        file.write_bytes(b"not to be read")
    return folder


def test_sizes_and_text_that_do_not_fit_are_refused(folder, stock, tmp_path):
    path = unread(shutil.copytree(folder, tmp_path / "model"))
    for resolution in ((128, 144), (144, 128)):
        with refused(OutsideError, "mismatch", "model.resolution") as told:
            load(path, resolution=resolution)
        assert "multiples of 32" in str(told.value) and "\n" not in str(told.value)
    spec = Model(backbone="qwen_image21", path="some/folder")
    other, texts = dict(stock.transformer.config), stock.text_encoder.config
    with refused(OutsideError, "mismatch", "model.path"):
        family_of(spec).check_text(spec, other | {"context_in_dim": 40}, {"text_encoder": texts})


@pytest.mark.parametrize("statistic", ["latents_mean", "latents_std"])
def test_a_vae_without_its_statistics_is_refused_before_weights_are_read(
    folder, tmp_path, statistic
):
    path = unread(shutil.copytree(folder, tmp_path / "model"))
    config = path / "vae" / "config.json"
    stated = json.loads(config.read_text())
    config.write_text(json.dumps(stated | {statistic: None}))
    with refused(OutsideError, "mismatch", "model.path") as told:
        load(path)
    assert statistic in str(told.value) and "\n" not in str(told.value)


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is there")
def test_a_processor_whose_library_is_not_installed_names_it(folder, tmp_path):
    """Qwen3-VL's own, unlike the tiny one's, reads videos as well."""
    made = unread(shutil.copytree(folder, tmp_path / "model"))
    index = made / "model_index.json"
    stated = json.loads(index.read_text())
    index.write_text(json.dumps(stated | {"processor": ["transformers", "Qwen3VLProcessor"]}))
    with refused(OutsideError, "unreadable", "model.path") as told:
        load(made)
    assert "needs torchvision" in str(told.value) and "\n" not in str(told.value)
