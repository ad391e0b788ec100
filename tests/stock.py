"""What a user of a run's exports gets: stock pipelines, and the pictures they draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from cdpo.engine.basics import keyed
from cdpo.engine.basics.keyed import Stream, content_id
from diffusers import (
    DiffusionPipeline,
    FluxPipeline,
    QwenImage21Pipeline,
    QwenImagePipeline,
    SanaPipeline,
    ZImagePipeline,
)
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

DENOISERS = ("unet", "transformer")


def stock_pipeline(base: Path, run: Path, form: str, **changes: Any) -> DiffusionPipeline:
    """The pipeline of an adapter (a folder or file of `run`) over the base model, some of whose
    parts are others, or of `run/merged`; of the class that the folder names.
    """
    if form == "merged":
        pipeline = DiffusionPipeline.from_pretrained(run / "merged")
    else:
        pipeline = DiffusionPipeline.from_pretrained(base, **changes)
        pipeline.load_lora_weights(run / form)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(pipeline: DiffusionPipeline) -> np.ndarray:
    """The sample row of the tiny recipe, (16, 32, 3) uint8 (`tiny.SIDES` says whose is larger),
    drawn without any code of the trainer: its first training and its first held-out prompt, 2
    steps, guidance 2.
    """
    prompts = [tiny.PROMPTS[0], tiny.HELDOUT[0]]
    keys = keyed.make_keys(3, Stream.SAMPLE_NOISE, [content_id(prompt) for prompt in prompts])
    noise = keyed.normal(keys, (4, 8, 8))
    if isinstance(pipeline, QwenImage21Pipeline):
        return _one_by_one(pipeline, prompts, noise)
    side = tiny.SIDES["sana"] if isinstance(pipeline, SanaPipeline) else 16
    # For samplers that add noise: each image has a generator, seeded by its own first noise.
    seeds = [content_id(row.numpy().tobytes().hex()) for row in noise]
    given: dict[str, Any] = {"latents": noise, "guidance_scale": 2.0}
    if isinstance(pipeline, FluxPipeline | QwenImagePipeline):
        given["latents"] = FluxPipeline._pack_latents(noise, 2, 4, 8, 8)
    if isinstance(pipeline, QwenImagePipeline):
        given["true_cfg_scale"], given["negative_prompt"] = given.pop("guidance_scale"), [" "] * 2
    if isinstance(pipeline, ZImagePipeline):
        given["guidance_scale"] -= 1
    if isinstance(pipeline, SanaPipeline):
        given["use_resolution_binning"] = False
    images = pipeline(
        prompt=prompts,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        num_inference_steps=2,
        height=side,
        width=side,
        **given,
    ).images
    return np.concatenate([np.asarray(image) for image in images], axis=1)


def _one_by_one(pipeline: QwenImage21Pipeline, prompts: list[str], noise: Tensor) -> np.ndarray:
    """In a batch it would be told that all texts are as long as the longest; alpha is left out."""
    side = tiny.SIDES["qwen_image21"]
    given: dict[str, Any] = {"true_cfg_scale": 2.0, "negative_prompt": " "}
    given |= {"num_inference_steps": 2, "height": side, "width": side}
    images = [
        pipeline(prompt, latents=start.flatten(2).mT, **given).images[0].convert("RGB")
        for prompt, start in zip(prompts, noise.split(1), strict=True)
    ]
    return np.concatenate([np.asarray(image) for image in images], axis=1)


def drawn(run: Path, step: int) -> np.ndarray:
    """The sample row that the trainer drew at a step."""
    with Image.open(run / "samples" / f"step-{step:08d}.png") as image:
        return np.asarray(image.convert("RGB"))


def assert_draws_what_the_trainer_drew(base: Path, run: Path, form: str, step: int = 6) -> None:
    assert_draws(stock_pipeline(base, run, form), run, step)


def assert_draws(pipeline: DiffusionPipeline, run: Path, step: int) -> None:
    """To one of 256 levels; and the picture is another than the base model's by more than that."""
    ours = drawn(run, step)
    assert levels_apart(ours, picture(pipeline)) <= 1
    assert levels_apart(ours, drawn(run, 0)) > 4


def levels_apart(one: np.ndarray, other: np.ndarray) -> int:
    """The farthest two pixels of the same place are apart, of 255."""
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def exported_unet(run: Path, kind: str = "") -> dict[str, Tensor]:
    """The denoiser of a merged export; ``kind`` is `ema` for the average."""
    return denoiser_weights(run / kind / "merged")


def denoiser_weights(pipeline: Path) -> dict[str, Tensor]:
    """All that the files of a pipeline's denoiser hold."""
    (folder,) = (f for f in pipeline.iterdir() if f.name in DENOISERS)
    parts = sorted(folder.glob("*.safetensors"))
    return {name: value for part in parts for name, value in load_file(part).items()}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The farthest two weights of the same name and place are apart."""
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)
