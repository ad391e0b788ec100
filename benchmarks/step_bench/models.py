"""The models whose training steps are timed, built with random weights from their configurations.

Those of real size have the published configurations. The tiny ones, for CPUs, are two levels of the
same blocks at 64x64 pixels, wide enough that a core spends its time on arithmetic and not on calls,
with prompts of ten tokens. Their VAEs are as wide as it takes for encoding an image to cost as
much, in forwards of the UNet, as it does at real size.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from cdpo.engine.models.sd import StableDiffusionText
from cdpo.engine.models.sdxl import StableDiffusionXLText
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from kernel_bench.unet_layers import SD15, SDXL, TEXT_TOKENS
from measuring.provenance import ROOT
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

Config = dict[str, Any]
# Any tokenizer does: how long a prompt's row of tokens is does not depend on its words.
TOKENIZER = ROOT / "assets" / "emoji" / "sd" / "tokenizer"
SCHEDULE: Config = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
VAE: Config = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
CLIP_L: Config = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
}
CLIP_BIG_G: Config = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "vocab_size": 49408,
    "hidden_act": "gelu",
}


@dataclass(frozen=True)
class StepModel:
    """A model, the size of its images, and the adapter that is trained."""

    family: str
    """`sd`, `sdxl` or `lcm`: objective, text encoders and noise process."""
    side: int
    """Height and width of its images, in pixels."""
    unet: Config
    vae: Config
    text: tuple[Config, ...]
    """Of one text encoder or two."""
    pairs: int
    """Pairs in a step, if they fit the device."""
    rank: int
    """Of the adapters on the attention, alpha the same."""
    tokens: int = TEXT_TOKENS
    """Length of an encoded prompt."""
    target: str = "teacher"
    """What a consistency model is held to: `teacher` or `image`."""

    @property
    def objective(self) -> Config:
        """As a recipe has it: the published loss of the family, or that of another target."""
        if self.family == "lcm":
            published = {"type": "consistency_dpo", "beta": 200.0, "distance": "pseudo_huber"}
            return published | {"target": self.target}
        return {"type": "diffusion_dpo", "beta": 5000.0}


REAL = {
    "SD1.5@512": StepModel("sd", 512, SD15, {**VAE, "scaling_factor": 0.18215}, (CLIP_L,), 16, 8),
    "SDXL@1024": StepModel(
        "sdxl", 1024, SDXL, {**VAE, "scaling_factor": 0.13025}, (CLIP_L, CLIP_BIG_G), 4, 8
    ),
    "LCM@768": StepModel("lcm", 768, SD15, {**VAE, "scaling_factor": 0.18215}, (CLIP_L,), 8, 8),
}
REAL["LCM-image@768"] = replace(REAL["LCM@768"], target="image")

SMALL: Config = {
    "block_out_channels": (96, 192),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
TINY_SD: Config = SMALL | {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4,
    "cross_attention_dim": 96,
}
TINY_XL: Config = SMALL | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (4, 8),
    "use_linear_projection": True,
    "cross_attention_dim": 96 + 160,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 160 + 6 * 32,
}
TINY_TEXT: Config = {
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "projection_dim": 96,
}
TINY_TEXT_2 = TINY_TEXT | {"hidden_size": 160, "intermediate_size": 640, "projection_dim": 160}


def _tiny_vae(*widths: int) -> Config:
    return VAE | {"block_out_channels": widths, "norm_num_groups": 8, "scaling_factor": 0.18215}


_LAST = {"tokens": 10, "rank": 4}
TINY = {
    "SD1.5@512": StepModel("sd", 64, TINY_SD, _tiny_vae(32, 40, 48, 48), (TINY_TEXT,), 4, **_LAST),
    "SDXL@1024": StepModel(
        "sdxl", 64, TINY_XL, _tiny_vae(16, 40, 72, 72), (TINY_TEXT, TINY_TEXT_2), 4, **_LAST
    ),
    "LCM@768": StepModel("lcm", 64, TINY_SD, _tiny_vae(24, 48, 56, 64), (TINY_TEXT,), 4, **_LAST),
}
TINY["LCM-image@768"] = replace(TINY["LCM@768"], target="image")


@dataclass(frozen=True)
class Networks:
    """A pipeline whose UNet is to be trained, and a consistency model's teacher if it has one."""

    pipeline: DiffusionPipeline
    teacher: UNet2DConditionModel | None


def build(model: StepModel, device: torch.device, dtype: torch.dtype) -> Networks:
    """Random weights, frozen; the same ones every time."""
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(**model.unet, sample_size=model.side // 8)
        vae = AutoencoderKL(**model.vae)
        first, *second = model.text
        encoders: list[nn.Module] = [CLIPTextModel(_text_config(model, first))]
        encoders += [CLIPTextModelWithProjection(_text_config(model, config)) for config in second]
        teacher = None
        if model.family == "lcm":
            teacher = unet if model.target == "teacher" else None
            unet = UNet2DConditionModel.from_config(unet.config, time_cond_proj_dim=256)
    for network in (unet, vae, teacher, *encoders):
        if network is not None:
            nn.Module.to(network, dtype).requires_grad_(False).eval()
    return Networks(_assemble(model, unet, vae, encoders), teacher)


def _assemble(
    model: StepModel, unet: UNet2DConditionModel, vae: AutoencoderKL, encoders: list[nn.Module]
) -> DiffusionPipeline:
    tokens = tokenizer(model)
    parts = {"unet": unet, "vae": vae, "scheduler": DDIMScheduler(**SCHEDULE)}
    parts |= {"text_encoder": encoders[0], "tokenizer": tokens}
    if model.family == "sdxl":
        parts |= {"text_encoder_2": encoders[1], "tokenizer_2": tokens}
        return StableDiffusionXLPipeline(**parts, add_watermarker=False)
    return StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def tokenizer(model: StepModel) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=model.tokens)


def _text_config(model: StepModel, config: Config) -> CLIPTextConfig:
    tokens = tokenizer(model)
    return CLIPTextConfig(
        **{"vocab_size": len(tokens)} | config,
        max_position_embeddings=model.tokens,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )


def text_conditioner(pipeline: DiffusionPipeline) -> StableDiffusionText | StableDiffusionXLText:
    """The engine's, with an empty cache of prompts."""
    if isinstance(pipeline, StableDiffusionXLPipeline):
        return StableDiffusionXLText(pipeline)
    return StableDiffusionText(pipeline)
