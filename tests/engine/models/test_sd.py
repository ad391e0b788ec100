"""Stable Diffusion as we drive it against the stock pipeline and modules of diffusers."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from cdpo.engine.basics.errors import CdpoError, OutsideError
from cdpo.engine.models import sd
from cdpo.engine.models.latent_diffusion import LatentDiffusion
from cdpo.engine.models.text import ROWS
from cdpo.engine.recipe import Model
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
from pictures import noise, pixels
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

CPU = torch.device("cpu")
PROMPTS = ["red apple", "house", "red apple"]
ZERO_TERMINAL_SNR = {  # arXiv 2305.08891, as models trained so are published
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
}


@pytest.fixture(scope="module")
def shared(tiny_world: Path) -> LatentDiffusion:
    """One backbone for the tests that leave it as it is."""
    return load(tiny_world / "sd")


def load(folder: Path, dtype: torch.dtype = torch.float32, **changes: object) -> LatentDiffusion:
    spec = Model(**{"path": str(folder), "resolution": (16, 16)} | changes)
    return sd.load(spec, CPU, dtype)


@contextmanager
def calls(module: nn.Module) -> Iterator[list[int]]:
    """The number of rows in each forward of a module."""
    rows: list[int] = []

    def note(_: nn.Module, inputs: tuple[torch.Tensor, ...], kwargs: dict[str, object]) -> None:
        rows.append(len(next(iter([*inputs, *kwargs.values()]))))

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    yield rows
    handle.remove()


def pictures(count: int) -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


# Loading


def test_frozen_and_in_eval_mode(shared):
    assert not any(p.requires_grad for p in shared.denoiser.parameters())
    parts = (shared.pipeline.unet, shared.pipeline.vae, shared.pipeline.text_encoder)
    assert not any(part.training for part in parts)
    assert shared.latent_shape((16, 24)) == (4, 8, 12)
    assert shared.scaling_factor == 0.5


def test_sampling_is_ddim_whatever_scheduler_the_folder_has(tmp_path, tiny_world):
    """SD 1.5 ships PNDM: its betas and prediction type carry over, its sampling does not."""
    folder = shutil.copytree(tiny_world / "sd", tmp_path / "sd")
    PNDMScheduler(
        beta_start=0.001, beta_schedule="linear", prediction_type="v_prediction"
    ).save_pretrained(folder / "scheduler")
    backbone = load(folder)
    config = backbone.pipeline.scheduler.config
    assert isinstance(backbone.pipeline.scheduler, DDIMScheduler)
    assert (config.beta_start, config.beta_schedule) == (0.001, "linear")
    assert backbone.noise.prediction_type == "v_prediction"
    assert not config.clip_sample  # latents are not pixels in [-1, 1]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def drop_tensor(path: Path, ending: str) -> None:
    state = load_file(path)
    del state[next(name for name in state if name.endswith(ending))]
    save_file(state, path, metadata={"format": "pt"})


UNET, VAE = (f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae"))
DAMAGE: dict[str, Callable[[Path], object]] = {
    "index of nothing": lambda folder: (folder / "model_index.json").write_text("{}"),
    "no unet": lambda folder: shutil.rmtree(folder / "unet"),
    "no weights": lambda folder: (folder / UNET).unlink(),
    "bad json": lambda folder: (folder / "unet" / "config.json").write_text("{"),
    "truncated unet": lambda folder: truncate(folder / UNET),
    "truncated encoder": lambda folder: truncate(folder / "text_encoder" / "model.safetensors"),
    "unet without a tensor": lambda folder: drop_tensor(folder / UNET, "conv_in.weight"),
    "vae without a tensor": lambda folder: drop_tensor(folder / VAE, "quant_conv.weight"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_one_line_that_names_it(damage, tmp_path, tiny_world):
    """Also where a tensor is missing: no layer of random or no numbers may pass for the model."""
    folder = shutil.copytree(tiny_world / "sd", tmp_path / "sd")
    DAMAGE[damage](folder)
    assert_one_line(OutsideError, f"model.path={folder}", lambda: load(folder))


def test_another_kind_of_folder_or_none(tmp_path, tiny_world):
    for path in (tmp_path / "absent", tmp_path, tiny_world / "reward", tiny_world / "sd" / "unet"):
        assert_one_line(OutsideError, f"model.path={path}", lambda path=path: load(path))


def test_a_wrong_vae_is_named_as_the_vae(tiny_world):
    for vae in ("/no/such/vae", str(tiny_world / "reward"), str(tiny_world / "sd" / "unet")):
        assert_one_line(
            OutsideError, f"model.vae={vae}", lambda vae=vae: load(tiny_world / "sd", vae=vae)
        )


def assert_one_line(kind: type[CdpoError], names: str, act: Callable[[], object]) -> None:
    with pytest.raises(kind) as caught:
        act()
    assert names in str(caught.value) and "\n" not in str(caught.value)


def test_another_vae_takes_the_place_of_the_models_own(tmp_path, tiny_world, shared):
    tiny.pipeline(seed=9).vae.save_pretrained(tmp_path / "vae")
    other = load(tiny_world / "sd", vae=str(tmp_path / "vae"))
    expected = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(v, expected[k]) for k, v in other.pipeline.vae.state_dict().items())
    assert other.fingerprints()["model"] == shared.fingerprints()["model"]
    assert other.fingerprints()["vae"] != shared.fingerprints()["vae"]


# Encoding


def test_latents_are_the_scaled_mean_of_the_posterior(shared, tiny_world):
    vae = AutoencoderKL.from_pretrained(tiny_world / "sd" / "vae").double()
    images = pictures(3)
    batch = torch.from_numpy(pixels(images)).double().permute(0, 3, 1, 2) / 255 * 2 - 1
    moments = vae.quant_conv(vae.encoder(batch))
    mean, _ = moments.chunk(2, dim=1)
    latents = shared.encode_images(images)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents.double(), mean * 0.5, rtol=0, atol=1e-5)


def test_images_that_are_not_rgb_are_encoded_as_rgb(shared):
    gray = pictures(1)[0].convert("L")
    assert torch.equal(shared.encode_images([gray]), shared.encode_images([gray.convert("RGB")]))


def test_prompts_are_embedded_as_the_stock_pipeline_does(shared, tiny_world):
    stock = StableDiffusionPipeline.from_pretrained(tiny_world / "sd", safety_checker=None)
    prompts = ["red apple", "", "a very long prompt " * 40]
    expected, _ = stock.encode_prompt(prompts, CPU, 1, do_classifier_free_guidance=False)
    torch.testing.assert_close(shared.encode_prompts(prompts).text, expected, rtol=0, atol=1e-6)


def test_each_distinct_prompt_is_encoded_once(tiny_backbone):
    with calls(tiny_backbone.pipeline.text_encoder) as rows:
        first = tiny_backbone.encode_prompts(PROMPTS).text
        again = tiny_backbone.encode_prompts(["house", "tree"]).text
    assert rows == [ROWS] * 2  # red apple and house; tree; the rest of both are fillers
    assert torch.equal(first[0], first[2]) and torch.equal(again[0], first[1])
    assert not torch.equal(again[0], again[1])


def test_conditioning_selects_rows(shared):
    conditioning = shared.encode_prompts(["red apple", "house", "tree"])
    assert torch.equal(conditioning.select([2, 0]).text, conditioning.text[[2, 0]])
    assert torch.equal(conditioning.first(2).text, conditioning.text[:2])


def test_predict_is_one_call_of_the_network(shared):
    noisy, timesteps = noise(3), torch.tensor([0, 400, 999])
    conditioning = shared.encode_prompts(PROMPTS)
    with calls(shared.denoiser) as rows:
        found = shared.predict(shared.denoiser, noisy, timesteps, conditioning)
    expected = shared.denoiser(noisy, timesteps, encoder_hidden_states=conditioning.text).sample
    assert rows == [3]
    assert torch.equal(found, expected)


def test_predict_casts_to_the_network(shared, tiny_world):
    half = load(tiny_world / "sd", torch.bfloat16)
    conditioning = shared.encode_prompts(PROMPTS)  # float32
    found = shared.predict(half.denoiser, noise(3), torch.tensor([0, 400, 999]), conditioning)
    assert found.dtype == torch.bfloat16 and found.isfinite().all()


# Sampling


@pytest.mark.parametrize(
    ("schedule", "timesteps"),
    [
        ({}, [751, 501, 251, 1]),
        ({"prediction_type": "v_prediction"}, [751, 501, 251, 1]),
        (ZERO_TERMINAL_SNR, [999, 749, 499, 249]),
    ],
    ids=["epsilon", "v", "zero-terminal-snr"],
)
@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 40)])
def test_sampling_is_the_stock_pipeline_with_ddim(
    tmp_path, tiny_world, same_images, schedule, timesteps, height, width
):
    """On the model's own schedule, whose first timestep a zero-terminal-SNR model must start at."""
    folder = shutil.copytree(tiny_world / "sd", tmp_path / "sd")
    ours = PNDMScheduler if "rescale_betas_zero_snr" not in schedule else DDIMScheduler
    ours(beta_schedule="scaled_linear", **schedule).save_pretrained(folder / "scheduler")
    backbone, asked = load(folder), []
    hook = backbone.denoiser.register_forward_pre_hook(
        lambda _, inputs: asked.append(int(inputs[1]))
    )
    start = torch.randn(3, 4, height // 2, width // 2)
    found = backbone.sample(backbone.denoiser, PROMPTS, start, steps=4, guidance=3.0)
    hook.remove()
    assert asked == timesteps

    stock = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config, clip_sample=False)
    stock.set_progress_bar_config(disable=True)
    expected = stock(
        PROMPTS,
        latents=start,
        num_inference_steps=4,
        guidance_scale=3.0,
        height=height,
        width=width,
    ).images
    assert found[0].size == (width, height)
    same_images("sd", stock, 4, pixels(expected), pixels(found))


def test_images_are_a_function_of_noise_steps_guidance_and_prompt(shared):
    def draw(
        prompts: list[str] = PROMPTS, seed: int = 0, steps: int = 2, guidance: float = 2.0
    ) -> np.ndarray:
        return pixels(
            shared.sample(
                shared.denoiser, prompts, noise(3, seed=seed), steps=steps, guidance=guidance
            )
        )

    base = draw()
    torch.rand(3)  # nothing hangs on global random state
    assert np.array_equal(base, draw())
    for other in (draw(seed=1), draw(steps=3), draw(guidance=9.0), draw(["tree"] * 3)):
        assert not np.array_equal(base, other)


@pytest.mark.parametrize(("guidance", "rows_a_call"), [(4.0, 6), (1.0, 3)])
def test_steps_and_guidance_cost_what_they_say(shared, guidance, rows_a_call):
    with calls(shared.denoiser) as rows:
        shared.sample(shared.denoiser, PROMPTS, noise(3), steps=5, guidance=guidance)
    assert rows == [rows_a_call] * 5


def test_sampling_another_network_leaves_the_backbone_alone(shared, tiny_world):
    other = load(tiny_world / "sd").denoiser
    with torch.no_grad():
        other.conv_out.weight.mul_(2)
    before, scheduler = shared.denoiser, shared.pipeline.scheduler
    own = pixels(shared.sample(before, PROMPTS, noise(3), steps=2, guidance=2.0))
    others = pixels(shared.sample(other, PROMPTS, noise(3), steps=2, guidance=2.0))
    assert not np.array_equal(own, others)
    assert shared.pipeline.unet is before and shared.pipeline.scheduler is scheduler
    assert scheduler.num_inference_steps is None
    again = pixels(shared.sample(before, PROMPTS, noise(3), steps=2, guidance=2.0))
    assert np.array_equal(own, again)


def test_sampling_in_half_precision_stays_close_to_float32(tiny_world, shared):
    half = load(tiny_world / "sd", torch.bfloat16)
    found, expected = (
        pixels(one.sample(one.denoiser, PROMPTS, noise(3), steps=2, guidance=2.0)).astype(int)
        for one in (half, shared)
    )
    assert np.abs(found - expected).mean() < 2
    assert torch.equal(half.encode_images(pictures(2)), shared.encode_images(pictures(2)))


# Fingerprints


def test_fingerprint_is_of_the_values_not_of_the_file(tmp_path, tiny_world, shared):
    folder = shutil.copytree(tiny_world / "sd", tmp_path / "sd")
    for part in ("unet", "vae"):
        weights = folder / part / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()
        config = json.loads((folder / part / "config.json").read_text())
        (folder / part / "config.json").write_text(json.dumps(config, indent=7))
    assert load(folder).fingerprints() == shared.fingerprints()


def test_fingerprint_of_the_vae_does_not_depend_on_the_precision_it_runs_in(tiny_world, shared):
    """Shards prepared in fp16 are trained on in bf16: one VAE, whatever it is cast to."""
    found = {
        load(tiny_world / "sd", dtype).fingerprints()["vae"]
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    assert found == {shared.fingerprints()["vae"]}


def test_networks_run_in_the_precision_asked_for_and_the_vae_in_float32(tiny_world):
    pipeline = load(tiny_world / "sd", torch.bfloat16).pipeline
    dtypes = {
        name: {p.dtype for p in getattr(pipeline, name).parameters()}
        for name in ("unet", "text_encoder", "vae")
    }
    assert dtypes == {
        "unet": {torch.bfloat16},
        "text_encoder": {torch.bfloat16},
        "vae": {torch.float32},
    }
