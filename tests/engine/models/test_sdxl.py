"""Stable Diffusion XL as we drive it against the stock pipeline and modules of diffusers."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from cdpo.engine.models import DTYPES, Framing, load_backbone
from cdpo.engine.models.latent_diffusion import LatentDiffusion
from cdpo.engine.models.sdxl import time_ids
from cdpo.engine.models.text import ROWS
from cdpo.engine.recipe import Model
from cdpo.engine.shards.batch import PairBatch
from cdpo.engine.shards.sample import PairMeta
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from pictures import noise, pixels

CPU = torch.device("cpu")
PROMPTS = ["red apple", "house", "red apple"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion XL on disk: not to be written to."""
    folder = tmp_path_factory.mktemp("sdxl")
    tiny.xl_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shared(folder: Path) -> LatentDiffusion:
    """One backbone for the tests that leave it as it is."""
    return load(folder)


@pytest.fixture(scope="module")
def stock(folder: Path) -> StableDiffusionXLPipeline:
    """The same model as a user loads it, with DDIM."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load(folder: Path, precision: str = "fp32", **changes: object) -> LatentDiffusion:
    spec = Model(**{"backbone": "sdxl", "path": str(folder), "resolution": (16, 16)} | changes)
    return load_backbone(spec, CPU, precision)


def framing(count: int) -> Framing:
    """Original sizes and crops that differ from image to image, sides up to a camera's."""
    sizes = torch.tensor([[1023, 1365], [512, 512], [4000, 3001]])
    crops = torch.tensor([[0, 7], [1, 0], [513, 0]])
    return Framing(sizes[:count], crops[:count], (16, 16))


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


# Loading


def test_frozen_in_eval_mode_and_sampled_with_ddim(shared):
    pipeline = shared.pipeline
    parts = [pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2]
    assert not any(p.requires_grad for part in parts for p in part.parameters())
    assert not any(part.training for part in parts)
    assert isinstance(pipeline.scheduler, DDIMScheduler)  # the folder has Euler's
    assert pipeline.scheduler.config.steps_offset == 1
    assert shared.latent_shape((16, 24)) == (4, 8, 12)


def test_a_variant_of_the_weights_is_what_the_recipe_names(tmp_path, shared):
    pipeline = tiny.xl_pipeline()
    pipeline.to(torch.float16).save_pretrained(tmp_path / "xl", variant="fp16")
    loaded = load(tmp_path / "xl", variant="fp16")
    assert loaded.denoiser.dtype == torch.float32
    for name, value in loaded.denoiser.state_dict().items():
        assert torch.equal(value, shared.denoiser.state_dict()[name].half().float())


def test_another_unet_takes_the_place_of_the_models_own(tmp_path, folder, shared):
    tiny.xl_pipeline(seed=5).unet.save_pretrained(tmp_path / "unet")
    other = load(folder, "bf16", unet=str(tmp_path / "unet"))
    assert other.denoiser is other.pipeline.unet and other.denoiser.dtype == torch.bfloat16
    assert other.fingerprints()["model"] != shared.fingerprints()["model"]
    assert other.fingerprints()["vae"] == shared.fingerprints()["vae"]


# Encoding


def test_prompts_are_embedded_as_the_stock_pipeline_does(shared, stock):
    prompts = ["red apple", "a very long prompt " * 40, "house"]
    text, _, pooled, _ = stock.encode_prompt(prompts, do_classifier_free_guidance=False)
    found = shared.encode_prompts(prompts)
    assert_same(found.text, text)
    assert_same(found.extras["text_embeds"], pooled)
    assert set(found.extras) == {"text_embeds"}


def test_text_is_the_last_layer_but_one_of_both_encoders(shared, stock):
    tokens = stock.tokenizer(
        ["house"], padding="max_length", max_length=stock.tokenizer.model_max_length
    )
    ids = torch.tensor(tokens.input_ids)
    with torch.no_grad():
        first = stock.text_encoder(ids, output_hidden_states=True)
        second = stock.text_encoder_2(ids, output_hidden_states=True)
    found = shared.encode_prompts(["house"])
    assert_same(found.text, torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=2))
    assert_same(found.extras["text_embeds"], second.text_embeds)


@pytest.mark.parametrize("zeros", [True, False])
def test_the_empty_prompt_is_the_pipelines_unconditional_input(tmp_path, zeros):
    pipeline = tiny.xl_pipeline(force_zeros_for_empty_prompt=zeros)
    pipeline.save_pretrained(tmp_path / "xl")
    _, negative, _, negative_pooled = pipeline.encode_prompt(["house"])
    found = load(tmp_path / "xl").encode_prompts(["house", ""])
    assert_same(found.text[1:], negative)
    assert_same(found.extras["text_embeds"][1:], negative_pooled)
    assert bool((found.text[1] == 0).all()) == zeros
    assert found.text[0].abs().min() > 0


def test_each_distinct_prompt_is_encoded_once(folder):
    backbone, rows = load(folder), []
    backbone.pipeline.text_encoder_2.register_forward_pre_hook(
        lambda _, inputs: rows.append(len(inputs[0]))
    )
    first = backbone.encode_prompts(PROMPTS)
    again = backbone.encode_prompts(["house", "tree"], framing(2))
    assert rows == [ROWS] * 2  # red apple and house; tree; the rest of both are fillers
    assert torch.equal(first.text[1], again.text[0])
    assert torch.equal(first.extras["text_embeds"][1], again.extras["text_embeds"][0])


# Size conditioning


def test_time_ids_are_those_of_the_stock_pipeline(stock):
    own = framing(3)
    expected = [
        stock._get_add_time_ids(
            tuple(size),
            tuple(crop),
            own.target_size,
            torch.float32,
            stock.text_encoder_2.config.projection_dim,
        )
        for size, crop in zip(own.original_sizes.tolist(), own.crops.tolist(), strict=True)
    ]
    assert torch.equal(time_ids(own), torch.cat(expected))


def test_winner_and_loser_have_each_its_own_time_ids(shared):
    """As the trainer puts them together: shard, batch, micro-batch, conditioning."""
    metas = [
        PairMeta(
            pair_id=pair,
            prompt=f"prompt {pair}",
            tier=1,
            scores=(1.0, 0.0),
            ranks=(1, 2),
            images=("w", "l"),
            original_size=((100 + pair, 200), (300 + pair, 400)),
            crop=((pair, 1), (pair, 2)),
        )
        for pair in range(4)
    ]
    batch = PairBatch.collate(metas, np.zeros((2, 4, 4, 8, 8), np.float16), np.zeros(4, np.int64))
    part = batch.split(2)[1]  # pairs 2 and 3
    conditioning = shared.encode_prompts(
        [*part.prompts, *part.prompts], Framing(part.original_sizes, part.crops, (16, 24))
    )
    assert conditioning.extras["time_ids"].tolist() == [
        [102, 200, 2, 1, 16, 24],
        [103, 200, 3, 1, 16, 24],
        [302, 400, 2, 2, 16, 24],
        [303, 400, 3, 2, 16, 24],
    ]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_predict_is_one_call_of_the_unet(folder, precision):
    backbone = load(folder, precision)
    net, dtype = backbone.denoiser, DTYPES[precision]
    noisy, timesteps = noise(3), torch.tensor([0, 400, 999])
    conditioning = backbone.encode_prompts(PROMPTS, framing(3))
    with torch.no_grad():
        found = backbone.predict(net, noisy, timesteps, conditioning)
        expected = net(
            noisy.to(dtype),
            timesteps,
            encoder_hidden_states=conditioning.text,
            added_cond_kwargs={
                "text_embeds": conditioning.extras["text_embeds"],
                # Not in bfloat16, which has no 1023, 1365 or 3001.
                "time_ids": time_ids(framing(3)),
            },
        ).sample
    assert found.dtype == dtype and torch.equal(found, expected)


def test_every_part_of_the_conditioning_reaches_the_unet(shared):
    def predict(**changes: torch.Tensor) -> torch.Tensor:
        conditioning = shared.encode_prompts(["house"], framing(1))
        conditioning.extras.update(changes)
        with torch.no_grad():
            return shared.predict(shared.denoiser, noise(1), torch.tensor([500]), conditioning)

    base = predict()
    assert torch.equal(predict(), base)
    assert not torch.equal(predict(text_embeds=torch.ones(1, 12)), base)
    for column in range(6):
        ids = time_ids(framing(1))
        ids[0, column] += 1
        assert not torch.equal(predict(time_ids=ids), base)


# Sampling


@pytest.mark.parametrize(("height", "width"), [(16, 16), (24, 16), (16, 40)])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sampling_is_the_stock_pipeline_with_ddim(
    shared, stock, same_images, height, width, guidance
):
    start = noise(3, height // 2, width // 2)
    expected = stock(
        PROMPTS,
        latents=start,
        num_inference_steps=4,
        guidance_scale=guidance,
        height=height,
        width=width,
    ).images
    found = shared.sample(shared.denoiser, PROMPTS, start, steps=4, guidance=guidance)
    assert found[0].size == (width, height)
    # Prompts are embedded in calls of one size, which round differently than the pipeline's own.
    found, expected = pixels(found), pixels(expected)
    same_images("sdxl", stock, 4, expected, found, most=1)
    assert np.abs(found.astype(int) - expected).mean() < 0.01


def test_a_zero_terminal_snr_model_is_sampled_on_its_own_schedule(tmp_path):
    """v prediction, trailing timesteps, betas rescaled: the first step starts from pure noise."""
    schedule = {
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
    }
    pipeline = tiny.xl_pipeline(scheduler=EulerDiscreteScheduler(**schedule))
    pipeline.save_pretrained(tmp_path / "xl")
    backbone = load(tmp_path / "xl")
    asked: list[int] = []
    backbone.denoiser.register_forward_pre_hook(lambda _, inputs: asked.append(int(inputs[1])))
    found = backbone.sample(backbone.denoiser, PROMPTS, noise(3), steps=4, guidance=2.0)
    assert asked == [999, 749, 499, 249]

    user = StableDiffusionXLPipeline.from_pretrained(tmp_path / "xl")
    user.set_progress_bar_config(disable=True)
    user.scheduler = DDIMScheduler(**schedule, clip_sample=False)
    size = {"height": 16, "width": 16}
    expected = user(
        PROMPTS, latents=noise(3), num_inference_steps=4, guidance_scale=2.0, **size
    ).images
    assert np.array_equal(pixels(found), pixels(expected))
