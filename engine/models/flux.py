"""FLUX.1 dev and schnell (Black Forest Labs): text and image in one transformer, guidance embedded.

Takes any folder or hub id in diffusers' `FluxPipeline` layout. Latents are packed, 2 x 2 of them a
token, with a place for each; the transformer is told time as 0 to 1 and predicts the velocity,
noise minus latents. Its text is that of a T5, and of a CLIP the pooled embedding alone.

dev was distilled from guidance: it is told a guidance weight and needs no second pass. In training
it is told `model.embedded_guidance`, in sampling what the sampler says. schnell, which was
distilled to few steps as well, is told none.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from ..basics.errors import OutsideError
from ..recipe import Model
from .checks import check_text_widths
from .flow_matching import FlowMatching
from .latent_diffusion import LatentDiffusion, packed, unpacked
from .pipelines import load_pipeline
from .protocol import Conditioning
from .text import T5Text, flux_tokens


def load(spec: Model, device: torch.device, dtype: torch.dtype) -> LatentDiffusion:
    """The model a recipe names; OutsideError tells what is wrong with its folder."""
    pipeline = load_pipeline(
        FluxPipeline,
        spec,
        dtype,
        kind="FLUX.1 model",
        denoiser=FluxTransformer2DModel,
    )
    check_text(spec, pipeline)
    side = 2 * pipeline.vae_scale_factor
    noise = FlowMatching(pipeline.scheduler, device, spec.resolution, side, spec.sigmas)
    ask = partial(_ask, spec.embedded_guidance)
    text = FluxText(pipeline)
    return LatentDiffusion(pipeline, text, noise, device, ask=ask, is_packed=True)


def check_text(spec: Model, pipeline: FluxPipeline) -> None:
    """OutsideError unless the text encoders give what the transformer takes."""
    clip, t5 = pipeline.text_encoder, pipeline.text_encoder_2
    if clip is None or t5 is None:
        raise OutsideError(
            f"model.path={spec.path} lacks a text encoder: FLUX.1 has a CLIP and a T5",
            "model.path",
            "unsupported",
        )
    config, pooled = pipeline.transformer.config, clip.config.hidden_size
    check_text_widths(spec, config, text=t5.config.d_model, pooled=pooled)


def _ask(
    guidance: float, net: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
) -> Tensor:
    config: Any = net.config
    count, _, height, width = noisy.shape
    device, dtype = noisy.device, noisy.dtype
    text = conditioning.text.to(dtype)
    places = torch.zeros(height // 2, width // 2, 3, device=device, dtype=dtype)
    places[..., 1] += torch.arange(height // 2, device=device)[:, None]
    places[..., 2] += torch.arange(width // 2, device=device)
    told = torch.full([count], guidance, device=device) if config["guidance_embeds"] else None
    prediction = net(
        packed(noisy),
        encoder_hidden_states=text,
        pooled_projections=conditioning.extras["pooled_projections"].to(dtype),
        timestep=timesteps.to(dtype) / 1000,  # as the pipeline rounds it
        guidance=told,
        img_ids=places.flatten(0, 1),
        txt_ids=torch.zeros(text.shape[1], 3, device=device, dtype=dtype),
        return_dict=False,
    )[0]
    return unpacked(prediction, height, width)


class FluxText(T5Text):
    """The T5's tokens; the pooled embedding of the CLIP."""

    def pipeline_inputs(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Without negative ones: guidance is embedded."""
        text, pooled = self.cache(prompts)
        return {"prompt_embeds": text, "pooled_prompt_embeds": pooled}

    def _embed_anew(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        text, pooled, _ = self._pipeline.encode_prompt(
            prompts,
            None,
            device=self._pipeline.device,  # not the encoder's, which may wait in host memory
            max_sequence_length=flux_tokens(self._pipeline.transformer.config),
        )
        return text, pooled
