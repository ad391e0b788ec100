"""Stable Diffusion 1.x and 2.x: one CLIP text encoder.

Takes any folder or hub id in diffusers' `StableDiffusionPipeline` layout, with epsilon, v or sample
prediction, zero-terminal-SNR schedules included.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..recipe import Model
from .checks import Config, check_diffusion_unet, check_parts, check_unet
from .ddpm import DiscreteDDPM
from .latent_diffusion import LatentDiffusion, ask_unet
from .pipelines import load_pipeline
from .protocol import Conditioning, Framing
from .text import CachedText, Encoders, Told


def load(
    spec: Model, device: torch.device, dtype: torch.dtype, *, reads_text: bool = True
) -> LatentDiffusion:
    """The model a recipe names; OutsideError tells what is wrong with its folder."""
    pipeline = load_pipeline(
        spec, dtype, reads_text=reads_text, safety_checker=None, requires_safety_checker=False
    )
    check_diffusion_unet(spec, pipeline.unet)
    check_parts(spec, pipeline, pipeline.text_encoder.config.hidden_size)
    noise = DiscreteDDPM(pipeline.scheduler, device)
    return LatentDiffusion(pipeline, StableDiffusionText(pipeline), noise, device)


check, ask = check_unet, ask_unet


def told(unet: Config, encoders: Encoders) -> Told:
    """Sizes of text and extras."""
    (encoder,) = encoders.values()
    return {"text": (encoder.config.max_position_embeddings, unet["cross_attention_dim"])}


class StableDiffusionText(CachedText):
    """Token embeddings (N, T, D), as the stock pipeline makes them."""

    def encode(self, prompts: Sequence[str], framing: Framing | None) -> Conditioning:
        """Framing is nothing that this family is told of."""
        (text,) = self.cache(prompts)
        return Conditioning(text)

    def pipeline_inputs(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        (text,), (negative,) = self.cache(prompts), self.cache([""] * len(prompts))
        return {"prompt_embeds": text, "negative_prompt_embeds": negative}

    def _embed_anew(self, prompts: list[str]) -> tuple[Tensor]:
        device = self._pipeline.text_encoder.device
        text, _ = self._pipeline.encode_prompt(
            prompts, device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return (text,)
