"""Qwen-Image and Z-Image as we drive them against the stock pipelines of diffusers: their prompts
have lengths of their own.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from cdpo.engine.basics.errors import OutsideError
from cdpo.engine.models import Conditioning, family_of
from cdpo.engine.models.flow_matching import shift_exponent
from cdpo.engine.models.latent_diffusion import LatentDiffusion, packed, unpacked
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
from torch import Tensor

CPU = torch.device("cpu")
PROMPTS = ["red apple", "a house by the sea, and behind it mountains with snow"]
SIZE = (16, 24)  # height and width of what is drawn
FAMILIES = ("qwen_image", "z_image")


@pytest.fixture(scope="module", params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk: not to be written to."""
    folder = tmp_path_factory.mktemp("own") / name
    tiny.PIPELINES[name]().save_pretrained(folder)
    return folder


def load(folder: Path, **changes: object) -> LatentDiffusion:
    return load_tiny(folder, **{"backbone": folder.name, "resolution": SIZE, **changes})


@pytest.fixture(scope="module")
def shared(folder: Path) -> LatentDiffusion:
    """One backbone for the tests that leave it as it is."""
    return load(folder)


@pytest.fixture(scope="module")
def stock(folder: Path) -> DiffusionPipeline:
    """The same model as a user loads it."""
    return as_users_load(folder)


def drawn(stock: DiffusionPipeline, name: str, start: Tensor, guidance: float) -> np.ndarray:
    """By the stock pipeline, which is told guidance in its own way."""
    options = {"num_inference_steps": 3, "height": SIZE[0], "width": SIZE[1]}
    if name == "qwen_image":
        nothing = [" "] * len(PROMPTS) if guidance > 1 else None
        own = {"true_cfg_scale": guidance, "negative_prompt": nothing, "latents": packed(start)}
    else:
        own = {"guidance_scale": guidance - 1, "latents": start}
    return pixels(stock(list(PROMPTS), **options, **own).images)


def stepped(shared: LatentDiffusion, name: str, start: Tensor, guidance: float) -> np.ndarray:
    """By our `predict`, the stock scheduler and the VAE alone."""
    own = shared.pipeline.scheduler
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(own.config)
    tokens = start.shape[-2] * start.shape[-1] // 4
    mu = shift_exponent(own, tokens) if own.config.use_dynamic_shifting else None
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 3, 3), mu=mu)
    latents, nothing = start, [""] * len(PROMPTS)

    def says(prompts: list[str], time: Tensor) -> Tensor:
        many = latents.repeat(len(prompts) // len(latents), 1, 1, 1)
        told = shared.encode_prompts(prompts)
        return shared.predict(shared.denoiser, many, time.expand(len(many)), told)

    with torch.no_grad():
        for time in scheduler.timesteps:
            if guidance == 1:
                answer = says(PROMPTS, time)
            elif name == "z_image":
                own_answer, empty = says([*PROMPTS, *nothing], time).chunk(2)
                answer = own_answer + (guidance - 1) * (own_answer - empty)
            else:
                own_answer, empty = packed(says(PROMPTS, time)), packed(says(nothing, time))
                both = empty + guidance * (own_answer - empty)
                norms = (x.norm(dim=-1, keepdim=True) for x in (own_answer, both))
                answer = unpacked(both * (next(norms) / next(norms)), *start.shape[-2:])
            latents = scheduler.step(answer, time, latents).prev_sample
    return pixels(shared.vae.decode(latents))


@pytest.mark.parametrize("guidance", [pytest.param(1.0, marks=pytest.mark.long), 4.0])
def test_images_are_the_stock_pipelines_to_the_bit(shared, stock, same_images, name, guidance):
    """By a loop over `predict`, and by `sample`, which ranks what users draw."""
    start = noise(2, SIZE[0] // 2, SIZE[1] // 2)
    expected = drawn(stock, name, start, guidance)
    own = stepped(shared, name, start, guidance)
    sampled = shared.sample(shared.denoiser, PROMPTS, start, steps=3, guidance=guidance)
    same_images(name, stock, 3, expected, own, pixels(sampled))


def test_a_prompt_is_embedded_as_the_stock_pipeline_does_it_alone(shared, stock):
    """To the bit, whatever stands beside it; a batch is as long as its longest prompt."""
    told = shared.encode_prompts(PROMPTS)
    assert told.lengths is not None and told.lengths[0] < told.lengths[1] == told.text.shape[1]
    for row, length, prompt in zip(told.text, told.lengths, PROMPTS, strict=True):
        found, _ = stock.encode_prompt([prompt], device=CPU)
        assert torch.equal(row[:length], found[0]) and not row[length:].any()


def test_padding_of_a_batch_says_nothing(shared):
    told, start = shared.encode_prompts(PROMPTS), noise(2)
    times = torch.tensor([900.0, 300.0])

    def says(rows: list[int], **changes: Tensor) -> Tensor:
        part = told.select(rows)
        for name, value in changes.items():
            object.__setattr__(part, name, value)
        return shared.predict(shared.denoiser, start[rows], times[rows], part)

    both = says([0, 1])
    alone = torch.cat([says([row]) for row in (0, 1)])
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-5)  # sums of other lengths
    filled = told.text.clone()
    filled[0, told.lengths[0] :] = 7.0
    assert torch.equal(says([0, 1], text=filled), both)


def test_images_are_selected_without_a_look_at_the_device():
    told = Conditioning(torch.empty(4, 3, 5, device="meta"), lengths=(3, 1, 2, 3))
    assert told.select([2, 0, 1]).lengths == (2, 3, 1)
    with pytest.raises(NotImplementedError):  # as for anything that asks a device for a value
        told.text.tolist()


def test_what_the_encoder_does_not_see_is_counted(shared):
    assert told_of_long(shared, [PROMPTS[1]]) is None
    told = told_of_long(shared, ["red apple " * 60])  # a token is a byte here
    assert told is not None and "more than the 512 tokens" in told


def test_corrupted_latents_and_targets(shared):
    assert_corrupted_to_velocities(shared, PROMPTS)


def test_latents_are_normalised_a_channel_at_a_time(name, shared, stock):
    images = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16), dtype=np.uint8)
    )
    given = images / 127.5 - 1
    with torch.no_grad():
        if name == "qwen_image":
            mean = stock.vae.encode(given.unsqueeze(2)).latent_dist.mean[:, :, 0]
            shift, std = (
                torch.tensor(stock.vae.config[f"latents_{of}"]).double().view(-1, 1, 1)
                for of in ("mean", "std")
            )
            expected = (mean.double() - shift) / std
        else:
            expected = (stock.vae.encode(given).latent_dist.mean.double() - 0.1) * 0.5
    found = shared.latents_of(shared.image_moments(images))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("knobs", "adapted"),
    [
        # q, k, v, out and the feed-forward: of both streams in one block; of one in three
        (("adapter.targets=attention+ff",), {"qwen_image": 8 + 4, "z_image": 3 * (4 + 3)}),
        pytest.param(
            ("adapter.dora=true",),
            {"qwen_image": 8, "z_image": 3 * 4},
            marks=pytest.mark.long,
        ),
        pytest.param(
            ("adapter.type=full", "export.formats=[merged]"),
            dict.fromkeys(FAMILIES, 0),
            marks=pytest.mark.long,
        ),
    ],
    ids=["lora", "dora", "full"],
)
def test_a_fresh_policy_is_its_reference_and_learns(
    name: str,
    folder: Path,
    tiny_recipe: Callable[..., Recipe],
    knobs: tuple[str, ...],
    adapted: dict[str, int],
) -> None:
    recipe = tiny_recipe(f"model.backbone={name}", f"model.path={folder}", *knobs)
    backbone = load(folder)
    assert_fresh_and_learns(recipe, backbone, PROMPTS, adapted[name])


# What does not fit


def unread(folder: Path) -> Path:
    """Its weights are not to be read."""
    for file in folder.glob("*/*.safetensors"):
        file.write_bytes(b"not to be read")
    return folder


def test_sizes_and_text_that_do_not_fit_are_refused(name, folder, stock, tmp_path):
    path = unread(shutil.copytree(folder, tmp_path / name))
    for resolution in ((16, 18), (18, 16)):
        with refused(OutsideError, "mismatch", "model.resolution") as told:
            load(path, resolution=resolution)
        assert "\n" not in str(told.value)
    spec = Model(backbone=name, path="some/folder")
    width = {"qwen_image": "joint_attention_dim", "z_image": "cap_feat_dim"}[name]
    other, texts = dict(stock.transformer.config) | {width: 40}, stock.text_encoder.config
    with refused(OutsideError, "mismatch", "model.path"):
        family_of(spec).check_text(spec, other, {"text_encoder": texts})


@pytest.mark.parametrize("statistic", ["latents_mean", "latents_std"])
@pytest.mark.parametrize("value", [None, [0.5]])
def test_a_vae_without_its_statistics_is_refused_before_weights_are_read(
    tmp_path, statistic, value
):
    pipeline = tiny.qwen_image_pipeline()
    pipeline.vae.register_to_config(**{statistic: value})
    pipeline.save_pretrained(tmp_path / "qwen_image")
    with refused(OutsideError, "mismatch", "model.path") as told:
        load(unread(tmp_path / "qwen_image"))
    assert statistic in str(told.value) and "\n" not in str(told.value)
