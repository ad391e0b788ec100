"""Stable Diffusion 3 and 3.5 (Esser et al., arXiv 2403.03206): text and image in one transformer.

Takes any folder or hub id in diffusers' `StableDiffusion3Pipeline` layout: 3 medium, 3.5 medium,
large, and large turbo. The transformer is told time as 0 to 1000 and predicts the velocity, noise
minus latents. Its text are 77 tokens of both CLIPs side by side, followed by 256 of the T5; a
folder whose model_index.json has `null` for the T5 has zeros there, as the pipeline does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn

from ..basics.errors import OutsideError
from ..recipe import Model
from .checks import check_transformer, unet_key, unet_name
from .flow_matching import FlowMatching
from .latent_diffusion import LatentDiffusion
from .pipelines import load_pipeline
from .protocol import Conditioning, Framing
from .text import T5_TOKENS, PromptCache


def load(spec: Model, device: torch.device, dtype: torch.dtype) -> LatentDiffusion:
    """The model a recipe names; OutsideError tells what is wrong with its folder."""
    pipeline = load_pipeline(
        StableDiffusion3Pipeline,
        spec,
        dtype,
        kind="Stable Diffusion 3 model",
        denoiser=SD3Transformer2DModel,
        scheduler_class=FlowMatchEulerDiscreteScheduler,
        check=partial(check_transformer, spec),
    )
    check_text(spec, pipeline)
    height, width = spec.resolution
    side = pipeline.vae_scale_factor * pipeline.patch_size
    noise = FlowMatching(
        pipeline.scheduler,
        device,
        resolution=spec.resolution,
        tokens=(height // side) * (width // side),
        sigmas=spec.sigmas,
    )
    return LatentDiffusion(pipeline, StableDiffusion3Text(pipeline), noise, device, ask=_ask)


def check_text(spec: Model, pipeline: StableDiffusion3Pipeline) -> None:
    """OutsideError unless the text encoders give what the transformer takes."""
    clips = (pipeline.text_encoder, pipeline.text_encoder_2)
    if None in clips:
        raise OutsideError(
            f"model.path={spec.path} lacks a CLIP text encoder: Stable Diffusion 3 can do without "
            "its T5 (text_encoder_3) alone",
            "model.path",
            "unsupported",
        )
    config, t5 = pipeline.transformer.config, pipeline.text_encoder_3
    side_by_side = sum(clip.config.hidden_size for clip in clips)
    width = max(side_by_side, config["joint_attention_dim"] if t5 is None else t5.config.d_model)
    pooled = sum(clip.config.projection_dim for clip in clips)
    for name, given in (("joint_attention_dim", width), ("pooled_projection_dim", pooled)):
        if config[name] != given:
            raise OutsideError(
                f"{unet_name(spec)} and the text encoders of model.path={spec.path} do not fit: "
                f"{name}={config[name]}, embeddings of width {given}",
                unet_key(spec),
                "mismatch",
            )


def _ask(net: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    prediction: Tensor = net(
        noisy,
        encoder_hidden_states=conditioning.text.to(noisy.dtype),
        pooled_projections=conditioning.extras["pooled_projections"].to(noisy.dtype),
        timestep=timesteps,
        return_dict=False,
    )[0]
    return prediction


class StableDiffusion3Text:
    """Token embeddings (N, T, D) and pooled ones (N, P), as the stock pipeline makes them."""

    def __init__(self, pipeline: StableDiffusion3Pipeline) -> None:
        self._pipeline = pipeline
        # Of each prompt whose end the CLIPs do not see it would print all padding; what nobody sees
        # is counted (`seen_tokens`).
        diffusers_logging.get_logger(type(pipeline).__module__).setLevel(diffusers_logging.ERROR)
        self.cache = PromptCache(self._embed_anew)

    def encode(self, prompts: Sequence[str], framing: Framing | None) -> Conditioning:
        """Framing is nothing that this family is told of."""
        text, pooled = self.cache(prompts)
        return Conditioning(text, {"pooled_projections": pooled})

    def pipeline_inputs(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        text, pooled = self.cache(prompts)
        negative, negative_pooled = self.cache([""] * len(prompts))
        return {
            "prompt_embeds": text,
            "pooled_prompt_embeds": pooled,
            "negative_prompt_embeds": negative,
            "negative_pooled_prompt_embeds": negative_pooled,
        }

    def _embed_anew(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        text, _, pooled, _ = self._pipeline.encode_prompt(
            prompts,
            None,
            None,
            device=self._pipeline.device,  # not the encoder's, which may wait in host memory
            do_classifier_free_guidance=False,
            max_sequence_length=T5_TOKENS,
        )
        return text, pooled
