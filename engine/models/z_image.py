"""Z-Image and Z-Image-Turbo (Alibaba's Tongyi lab): text and image in one stream, 6 B parameters.

Takes any folder or hub id in diffusers' `ZImagePipeline` layout. The transformer takes a list of
images and one of texts, cuts latents into patches by itself, is told (1000 - t) / 1000, which is 1
without noise, and gives the velocity negated. Its text are the last but one hidden states of a
Qwen3, of a prompt in a chat's template: up to 512 tokens.

The pipeline's `guidance_scale` is the weight of what is added, 0 for none: that of a sampler less
1, as for LCMs. Turbo, which was distilled to few steps without guidance, is drawn with `guidance:
1`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..recipe import Model
from .checks import Config, check_text_widths, check_transformer
from .flow_matching import FlowMatching
from .latent_diffusion import LatentDiffusion
from .pipelines import load_pipeline
from .protocol import Conditioning
from .text import Encoders, LimitedText, Told

PATCH = 2  # the pipeline's, of those that the transformer may have


def load(
    spec: Model, device: torch.device, dtype: torch.dtype, *, reads_text: bool = True
) -> LatentDiffusion:
    """The model a recipe names; OutsideError tells what is wrong with its folder."""
    pipeline = load_pipeline(spec, dtype, reads_text=reads_text, check=check, check_text=check_text)
    side = PATCH * pipeline.vae_scale_factor
    noise = FlowMatching(pipeline.scheduler, device, spec.resolution, side, spec.sigmas)
    return LatentDiffusion(pipeline, ZImageText(pipeline), noise, device, ask, draw)


def check(spec: Model, transformer: Config, vae: Config) -> None:
    """OutsideError unless latents, patches and the resolution go together."""
    check_transformer(
        spec,
        vae,
        channels={"in_channels": transformer["in_channels"]},
        patch=PATCH,
        most=min(transformer["axes_lens"][1:]),
    )


def check_text(spec: Model, transformer: Config, texts: Mapping[str, Any]) -> None:
    """OutsideError unless a text encoder of this config gives what the transformer takes."""
    check_text_widths(spec, transformer, cap_feat_dim=texts["text_encoder"].hidden_size)


def told(transformer: Config, encoders: Encoders) -> Told:
    """Sizes of text and extras."""
    return {"text": (ZImageText.tokens, transformer["cap_feat_dim"])}


def ask(net: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """The velocity it predicts."""
    text = conditioning.text.to(noisy.dtype)
    lengths = conditioning.lengths or (text.shape[1],) * len(text)
    found = net(
        list(noisy.unsqueeze(2)),
        (1000 - timesteps) / 1000,
        [row[:length] for row, length in zip(text, lengths, strict=True)],
        return_dict=False,
    )[0]
    return -torch.stack(found).squeeze(2)


def draw(pipeline: Any, noise: Tensor, guidance: float, **given: Any) -> Tensor:
    """Its latents are float32 at any precision."""
    latents: Tensor = pipeline(latents=noise.float(), guidance_scale=guidance - 1, **given).images
    return latents


class ZImageText(LimitedText):
    """What a Qwen3 makes of a user's turn."""

    tokens = 512

    def in_template(self, prompt: str) -> str:
        turn = [{"role": "user", "content": prompt}]
        text: str = self._pipeline.tokenizer.apply_chat_template(
            turn, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return text

    def _embed_anew(self, prompts: list[str]) -> tuple[list[Tensor]]:
        text, _ = self._pipeline.encode_prompt(
            list(prompts),  # which it writes its template into
            device=self._pipeline.device,  # not the encoder's, which may wait in host memory
            do_classifier_free_guidance=False,
            max_sequence_length=self.tokens,
        )
        return (text,)
