"""Stable Diffusion 3 and 3.5 (Esser et al., arXiv 2403.03206): text and image in one transformer.

Takes any folder or hub id in diffusers' `StableDiffusion3Pipeline` layout: 3 medium, 3.5 medium,
large, and large turbo. The transformer is told time as 0 to 1000 and predicts the velocity, noise
minus latents. Its text are 77 tokens of both CLIPs side by side, followed by 256 of the T5; a
folder whose model_index.json has `null` for the T5 has zeros there, as the pipeline does. A
transformer whose text is no wider than both CLIPs', which was made without a T5, has nothing there:
the stock pipeline draws its pictures with `max_sequence_length=0`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..basics.errors import OutsideError
from ..recipe import Model
from .checks import Config, check_text_widths, check_transformer
from .flow_matching import FlowMatching
from .latent_diffusion import LatentDiffusion
from .pipelines import load_pipeline
from .protocol import Conditioning
from .text import Encoders, T5Text, Told

T5_TOKENS = 256  # that the stock pipeline lets its T5 see


def load(
    spec: Model, device: torch.device, dtype: torch.dtype, *, reads_text: bool = True
) -> LatentDiffusion:
    """The model a recipe names; OutsideError tells what is wrong with its folder."""
    pipeline = load_pipeline(spec, dtype, reads_text=reads_text, check=check, check_text=check_text)
    side = pipeline.vae_scale_factor * pipeline.patch_size
    noise = FlowMatching(pipeline.scheduler, device, spec.resolution, side, spec.sigmas)
    return LatentDiffusion(pipeline, StableDiffusion3Text(pipeline), noise, device, ask)


def check(spec: Model, transformer: Config, vae: Config) -> None:
    """OutsideError unless latents, patches and the resolution go together."""
    check_transformer(
        spec,
        vae,
        channels={end: transformer[end] for end in ("in_channels", "out_channels")},
        patch=transformer["patch_size"],
        most=transformer["pos_embed_max_size"],
    )


def told(transformer: Config, encoders: Encoders) -> Told:
    """Sizes of text and extras."""
    clip = encoders["text_encoder"].config.max_position_embeddings
    return {
        "text": (clip + tokens_of_t5(transformer, encoders), transformer["joint_attention_dim"]),
        "pooled_projections": (transformer["pooled_projection_dim"],),
    }


def tokens_of_t5(transformer: Config, encoders: Encoders) -> int:
    """How many of the T5, or zeros in place of one, follow those of the CLIPs."""
    clips = (encoders["text_encoder"], encoders["text_encoder_2"])
    made_for_clips = transformer["joint_attention_dim"] == sum(c.config.hidden_size for c in clips)
    return 0 if made_for_clips and encoders.get("text_encoder_3") is None else T5_TOKENS


def check_text(spec: Model, transformer: Config, texts: Mapping[str, Any]) -> None:
    """OutsideError unless text encoders of these configs give what the transformer takes."""
    clips = [texts[name] for name in ("text_encoder", "text_encoder_2") if name in texts]
    if len(clips) < 2:
        raise OutsideError(
            f"model.path={spec.path} lacks a CLIP text encoder: Stable Diffusion 3 can do without "
            "its T5 (text_encoder_3) alone",
            "model.path",
            "unsupported",
        )
    t5 = texts.get("text_encoder_3")
    side_by_side = sum(clip.hidden_size for clip in clips)
    width = max(side_by_side, transformer["joint_attention_dim"] if t5 is None else t5.d_model)
    pooled = sum(clip.projection_dim for clip in clips)
    check_text_widths(spec, transformer, joint_attention_dim=width, pooled_projection_dim=pooled)


def ask(net: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """The velocity it predicts."""
    prediction: Tensor = net(
        noisy,
        encoder_hidden_states=conditioning.text.to(noisy.dtype),
        pooled_projections=conditioning.extras["pooled_projections"].to(noisy.dtype),
        timestep=timesteps,
        return_dict=False,
    )[0]
    return prediction


class StableDiffusion3Text(T5Text):
    """Both CLIPs' tokens side by side, then the T5's; pooled ones of the CLIPs."""

    def _readers(self) -> list[tuple[Any, int]]:
        parts = self._pipeline  # a folder may keep the tokenizer of a T5 that is not there
        has_t5 = parts.text_encoder_3 is not None
        return [(parts.tokenizer_3, T5_TOKENS)] if has_t5 else super()._readers()

    def _embed_anew(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        parts = self._pipeline
        text, _, pooled, _ = parts.encode_prompt(
            prompts,
            None,
            None,
            device=parts.device,  # not the encoder's, which may wait in host memory
            do_classifier_free_guidance=False,
            max_sequence_length=tokens_of_t5(parts.transformer.config, parts.components),
        )
        return text, pooled
