"""What a user of a run's exports gets: stock pipelines, and the pictures they draw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tiny
from cdpo.engine import keyed
from cdpo.engine.keyed import Stream, content_id
from diffusers import StableDiffusionPipeline
from PIL import Image


def stock_pipeline(base: Path, run: Path, form: str) -> StableDiffusionPipeline:
    """The pipeline of `run/lora` or `run/kohya` over the base model, or of `run/merged`."""
    merged = form == "merged"
    folder = run / "merged" if merged else base
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    if not merged:
        pipeline.load_lora_weights(run / form)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(pipeline: StableDiffusionPipeline) -> np.ndarray:
    """The sample row of the tiny recipe, (16, 32, 3) uint8, drawn without any code of the trainer:
    its first training and its first held-out prompt, 2 steps, guidance 2.
    """
    prompts = [tiny.PROMPTS[0], tiny.HELDOUT[0]]
    keys = keyed.make_keys(3, Stream.SAMPLE_NOISE, [content_id(prompt) for prompt in prompts])
    images = pipeline(
        prompts,
        latents=keyed.normal(keys, (4, 8, 8)),
        num_inference_steps=2,
        guidance_scale=2.0,
        height=16,
        width=16,
    ).images
    return np.concatenate([np.asarray(image) for image in images], axis=1)


def drawn(run: Path, step: int) -> np.ndarray:
    """The sample row that the trainer drew at a step."""
    with Image.open(run / "samples" / f"step-{step:08d}.png") as image:
        return np.asarray(image.convert("RGB"))


def assert_draws_what_the_trainer_drew(base: Path, run: Path, form: str) -> None:
    """To one of 256 levels; and the picture is another than the base model's by more than that."""
    ours = drawn(run, 6)
    assert levels_apart(ours, picture(stock_pipeline(base, run, form))) <= 1
    assert levels_apart(ours, drawn(run, 0)) > 4


def levels_apart(one: np.ndarray, other: np.ndarray) -> int:
    """The farthest two pixels of the same place are apart, of 255."""
    return int(np.abs(one.astype(int) - other.astype(int)).max())
