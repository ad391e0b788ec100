"""A world small enough for unit tests: random weights, but real classes in the real folder format.

`build(folder)` writes a Stable Diffusion pipeline, two CLIP models and prompt files, and returns a
recipe for them. Tokenizers are those of `assets/emoji`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
)

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "assets" / "emoji" / "sd" / "tokenizer"
PROMPTS = ["red apple", "grinning face", "cat face", "blue car", "house", "yellow sun", "tree"]
HELDOUT = ["dog face", "green book", "rocket"]
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(TOKENIZER)


def text_config(tokens: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokens),
        max_position_embeddings=tokens.model_max_length,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        projection_dim=16,
        **TEXT,
    )


def pipeline(seed: int = 0, prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    """A Stable Diffusion of some 30,000 parameters: 16x16 pixels, 8x8 latents of 4 channels."""
    torch.manual_seed(seed)
    tokens = tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config(tokens)),
        tokenizer=tokens,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            clip_sample=False,
            prediction_type=prediction_type,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_clip(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    tokens = tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    config = CLIPConfig(
        text_config=text_config(tokens).to_dict(),
        vision_config=vision.to_dict(),
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    tokens.save_pretrained(folder)
    size = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(folder)


def build(folder: Path) -> dict[str, Any]:
    """Write the world under ``folder``; returns a recipe as plain data, run in ``folder/run``."""
    pipeline().save_pretrained(folder / "sd")
    save_clip(folder / "reward", seed=1)
    save_clip(folder / "judge", seed=2)
    (folder / "train.txt").write_text("\n".join(PROMPTS))
    (folder / "heldout.txt").write_text("\n".join(HELDOUT))
    (folder / "zero2.json").write_text('{"zero_optimization": {"stage": 2}}')
    return {
        "run_dir": str(folder / "run"),
        "seed": 3,
        "model": {"path": str(folder / "sd"), "resolution": [16, 16]},
        "prompts": {"train": str(folder / "train.txt"), "heldout": str(folder / "heldout.txt")},
        "reward": {"path": str(folder / "reward")},
        "prepare": {
            "candidates_per_prompt": 6,
            "sampler": {"steps": 2, "guidance": 2.0},
            "batch_size": 16,
            "contact_sheet_prompts": 2,
        },
        "curriculum": {"tiers": 3, "steps_per_tier": 2, "pairs_per_prompt_per_tier": 6},
        "data": {"lanes": 2, "pairs_per_shard": 10},
        "adapter": {"rank": 2, "alpha": 2.0},
        "train": {
            "steps": 6,
            "global_batch": 8,
            "micro_batch": 4,
            "optimizer": {"lr": 1e-3},
            "log_every": 2,
            "sample_every": 3,
            "sample_prompts": 1,
            "threads": 1,
        },
        "deepspeed": str(folder / "zero2.json"),
        "checkpoint": {"every": 2},
        "compare": {
            "images_per_prompt": 2,
            "sampler": {"steps": 2, "guidance": 2.0},
            "batch_size": 16,
            "judge": {"path": str(folder / "judge")},
            "bootstrap": 200,
        },
    }


def write_recipe(path: Path, recipe: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path
