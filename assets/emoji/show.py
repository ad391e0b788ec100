"""Pictures for the README: samples of both bases, what was distilled beside what it was distilled
from, reconstructions.

    python assets/emoji/show.py samples --guidance 2 --steps 15
    python assets/emoji/show.py flow_samples --steps 10
    python assets/emoji/show.py lcm_samples
    python assets/emoji/show.py turbo_samples
    python assets/emoji/show.py reconstructions

Each writes a PNG of at most 255 colours next to this file.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import diffusers
import torch
from data import load_pairs, read_prompts, to_unit
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
ZOOM = 3  # shown size of a pixel
PICTURES = ("samples", "flow_samples", "lcm_samples", "turbo_samples", "reconstructions")


def load_pipeline() -> StableDiffusionPipeline:
    """The committed pipeline in float32, silent."""
    diffusers.utils.logging.disable_progress_bar()
    pipeline = StableDiffusionPipeline.from_pretrained(HERE / "sd", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_flow_pipeline() -> StableDiffusion3Pipeline:
    """The flow model in float32, silent; diffusers wants to be told that it has no T5."""
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()  # it warns of padding as if it were text
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        HERE / "sd3", text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_turbo_pipeline() -> StableDiffusion3Pipeline:
    """The distilled transformer in the pipeline of the flow model, in float32."""
    pipeline = load_flow_pipeline()
    pipeline.transformer = SD3Transformer2DModel.from_pretrained(
        HERE / "sd3_turbo", torch_dtype=torch.float32
    )
    return pipeline


def load_lcm_pipeline() -> LatentConsistencyModelPipeline:
    """The distilled UNet among the parts of the pipeline it was distilled from, in float32."""
    parts = load_pipeline().components
    unet = UNet2DConditionModel.from_pretrained(HERE / "lcm", torch_dtype=torch.float32)
    scheduler = LCMScheduler.from_config(parts["scheduler"].config)
    pipeline = LatentConsistencyModelPipeline(
        **{**parts, "unet": unet, "scheduler": scheduler}, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(
    pipeline: DiffusionPipeline, prompts: list[str], seed: int, steps: int, guidance: float
) -> torch.Tensor:
    """One picture a prompt, (N, 3, 32, 32) in 0..1; each prompt has a noise of its own."""
    # Nor has it seen the zeros that stand in for a T5.
    options = {"max_sequence_length": 0} if "transformer" in pipeline.components else {}
    images = []
    for start in range(0, len(prompts), 64):
        part = prompts[start : start + 64]
        noises = [torch.Generator().manual_seed(seed * 10**6 + start + i) for i in range(len(part))]
        output = pipeline(
            part,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=noises,
            output_type="pt",
            **options,
        )
        images.append(output.images.float())
    return torch.cat(images)


def sheet(images: torch.Tensor, labels: list[str], columns: int) -> Image.Image:
    """A grid of enlarged pictures with their captions, wrapped, beneath."""
    side, foot = 32 * ZOOM, 26
    cell_w, cell_h = side + 12, side + foot + 6
    rows = -(-len(images) // columns)
    paper = Image.new("RGB", (columns * cell_w, rows * cell_h), "white")
    draw = ImageDraw.Draw(paper)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        x, y = (i % columns) * cell_w + 6, (i // columns) * cell_h + 3
        array = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        paper.paste(Image.fromarray(array).resize((side, side), Image.Resampling.NEAREST), (x, y))
        words, lines = label.split(), [""]
        for word in words:
            if draw.textlength(f"{lines[-1]} {word}") > cell_w - 4 and lines[-1]:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        for row, line in enumerate(lines[:2]):
            draw.text((x + side / 2, y + side + 1 + 12 * row), line, fill="black", anchor="ma")
    return paper


def reconstructions() -> Image.Image:
    """48 pictures, each with its VAE reconstruction beneath it."""
    pixels, captions = load_pairs()
    picked = random.Random(0).sample(range(len(captions)), 48)
    vae = AutoencoderKL.from_pretrained(HERE / "sd" / "vae", torch_dtype=torch.float32).eval()
    real = to_unit(pixels[picked])
    with torch.no_grad():
        decoded = vae.decode(vae.encode(real).latent_dist.mode()).sample
    both = torch.cat([real, decoded], dim=2) / 2 + 0.5  # original above, reconstruction below
    images = torch.stack([image for pair in both for image in pair.split(32, dim=1)])
    order = [
        row * 24 + 2 * column + half for row in range(4) for half in (0, 1) for column in range(12)
    ]
    labels = [text for i in picked for text in (captions[i], "reconstruction")]
    return sheet(images[order], [labels[i] for i in order], 12)


def side_by_side(
    columns: list[tuple[str, DiffusionPipeline, int, float]], seed: int
) -> Image.Image:
    """12 prompts, drawn by each of (label, pipeline, steps, guidance); two prompts a row."""
    prompts = random.Random(0).sample(read_prompts("train"), 12)
    drawn = [sample(pipeline, prompts, seed, steps, by) for _, pipeline, steps, by in columns]
    labels = [label or prompt for prompt in prompts for label, *_ in columns]
    return sheet(torch.stack(drawn, dim=1).flatten(0, 1), labels, 2 * len(columns))


def lcm_samples(seed: int, steps: int, guidance: float) -> Image.Image:
    """By the teacher and by the LCM in 1, 2, 4 and 8 steps."""
    lcm = load_lcm_pipeline()
    few = [(f"LCM, {n} step{'s' * (n > 1)}", lcm, n, guidance) for n in (1, 2, 4, 8)]
    return side_by_side([("", load_pipeline(), steps, guidance), *few], seed)


def turbo_samples(seed: int, steps: int, guidance: float) -> Image.Image:
    """By the flow model, and by it and the one that was distilled from it in 1 and 2 steps: the
    stock pipeline's `num_inference_steps` are one more, the last of which changes nothing.
    """
    flow, turbo = load_flow_pipeline(), load_turbo_pipeline()
    columns: list[tuple[str, DiffusionPipeline, int, float]] = [("", flow, steps, guidance)]
    for few, label in ((1, "1 step"), (2, "2 steps")):
        columns.append((f"same, {label}", flow, few + 1, guidance))
        columns.append((f"distilled, {label}", turbo, few + 1, 1.0))
    return side_by_side(columns, seed)


def main() -> None:
    """Write one of the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=PICTURES)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=Path, help="one a line; default: 48 of ours")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    out = args.out or HERE / f"{args.what}.png"
    if args.what == "reconstructions":
        paper = reconstructions()
    elif args.what in ("lcm_samples", "turbo_samples"):
        draw = lcm_samples if args.what == "lcm_samples" else turbo_samples
        paper = draw(args.seed, args.steps, args.guidance)
    else:
        prompts = (
            args.prompts.read_text().splitlines()
            if args.prompts
            else random.Random(0).sample(read_prompts("train", "heldout"), 48)
        )
        started = time.time()
        pipeline = load_flow_pipeline() if args.what == "flow_samples" else load_pipeline()
        images = sample(pipeline, prompts, args.seed, args.steps, args.guidance)
        print(f"{len(prompts)} pictures in {time.time() - started:.1f}s")
        paper = sheet(images, prompts, 8)
    paper.quantize(255, dither=Image.Dither.NONE).save(out, optimize=True)
    print(out, out.stat().st_size)


if __name__ == "__main__":
    main()
