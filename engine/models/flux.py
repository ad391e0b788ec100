"""FLUX.1 dev and schnell (Black Forest Labs): text and image in one transformer, guidance embedded.

Takes any folder or hub id in diffusers' `FluxPipeline` layout. Latents are packed, 2 x 2 of them a
token, with a place for each; the transformer is told time as 0 to 1 and predicts the velocity,
noise minus latents. Its text is that of a T5, and of a CLIP the pooled embedding alone.

dev was distilled from guidance: it is told a guidance weight and needs no second pass. In training
it is told `model.embedded_guidance`, in sampling what the sampler says. schnell, which was
distilled to few steps as well, is told none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from ..basics.errors import OutsideError
from ..recipe import Model
from .checks import Config, check_text_widths, check_transformer
from .flow_matching import FlowMatching
from .latent_diffusion import GUIDANCE, LatentDiffusion, packed, unpacked
from .pipelines import load_pipeline
from .protocol import Conditioning, Framing
from .text import Encoders, T5Text, Told


def load(
    spec: Model, device: torch.device, dtype: torch.dtype, *, reads_text: bool = True
) -> LatentDiffusion:
    """The model a recipe names; OutsideError tells what is wrong with its folder."""
    pipeline = load_pipeline(spec, dtype, reads_text=reads_text, check=check, check_text=check_text)
    side = 2 * pipeline.vae_scale_factor
    noise = FlowMatching(pipeline.scheduler, device, spec.resolution, side, spec.sigmas)
    text = FluxText(pipeline, spec.embedded_guidance)
    return LatentDiffusion(pipeline, text, noise, device, ask, draw)


def check(spec: Model, transformer: Config, vae: Config) -> None:
    """OutsideError unless latents, patches and the resolution go together."""
    channels = {"a quarter of in_channels": transformer["in_channels"] // 4}
    check_transformer(spec, vae, channels=channels, patch=2)


def told(transformer: Config, encoders: Encoders) -> Told:
    """Sizes of text and extras."""
    return {
        "text": (tokens_of(transformer), transformer["joint_attention_dim"]),
        "pooled_projections": (transformer["pooled_projection_dim"],),
        GUIDANCE: (),
    }


def tokens_of(transformer: Config) -> int:
    """How many tokens its T5 sees: 512 as the stock pipeline says, and of schnell, which embeds no
    guidance, 256 as its page does.
    """
    return 512 if transformer["guidance_embeds"] else 256


def check_text(spec: Model, transformer: Config, texts: Mapping[str, Any]) -> None:
    """OutsideError unless text encoders of these configs give what the transformer takes."""
    clip, t5 = texts.get("text_encoder"), texts.get("text_encoder_2")
    if clip is None or t5 is None:
        raise OutsideError(
            f"model.path={spec.path} lacks a text encoder: FLUX.1 has a CLIP and a T5",
            "model.path",
            "unsupported",
        )
    check_text_widths(
        spec,
        transformer,
        joint_attention_dim=t5.d_model,
        pooled_projection_dim=clip.hidden_size,
    )


def ask(net: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """The velocity it predicts."""
    config: Any = net.config
    height, width = noisy.shape[-2:]
    device, dtype = noisy.device, noisy.dtype
    text = conditioning.text.to(dtype)
    places = torch.zeros(height // 2, width // 2, 3, device=device, dtype=dtype)
    places[..., 1] += torch.arange(height // 2, device=device)[:, None]
    places[..., 2] += torch.arange(width // 2, device=device)
    prediction = net(
        packed(noisy),
        encoder_hidden_states=text,
        pooled_projections=conditioning.extras["pooled_projections"].to(dtype),
        timestep=timesteps.to(dtype) / 1000,  # as the pipeline rounds it
        guidance=conditioning.extras[GUIDANCE] if config["guidance_embeds"] else None,
        img_ids=places.flatten(0, 1),
        txt_ids=torch.zeros(text.shape[1], 3, device=device, dtype=dtype),
        return_dict=False,
    )[0]
    return unpacked(prediction, height, width)


def takes_guidance(transformer: Config, pipeline: Config) -> bool:
    """Whether it is told any: dev is, schnell is not."""
    return bool(transformer["guidance_embeds"])


def draw(pipeline: Any, noise: Tensor, guidance: float, **given: Any) -> Tensor:
    """It packs no latents that are given."""
    tokens = pipeline(latents=packed(noise), guidance_scale=guidance, **given).images
    return unpacked(tokens, *noise.shape[-2:])


class FluxText(T5Text):
    """The T5's tokens; the pooled embedding of the CLIP, and the guidance of training."""

    def __init__(self, pipeline: FluxPipeline, guidance: float) -> None:
        super().__init__(pipeline)
        self._guidance = guidance

    def encode(self, prompts: Sequence[str], framing: Framing | None) -> Conditioning:
        found = super().encode(prompts, framing)
        guidance = torch.full([len(prompts)], self._guidance, device=found.text.device)
        return found.with_extras(**{GUIDANCE: guidance})

    def pipeline_inputs(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Without negative ones: guidance is embedded."""
        text, pooled = self.cache(prompts)
        return {"prompt_embeds": text, "pooled_prompt_embeds": pooled}

    def _readers(self) -> list[tuple[Any, int]]:
        pipeline = self._pipeline
        return [(pipeline.tokenizer_2, tokens_of(pipeline.transformer.config))]

    def _embed_anew(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        text, pooled, _ = self._pipeline.encode_prompt(
            prompts,
            None,
            device=self._pipeline.device,  # not the encoder's, which may wait in host memory
            max_sequence_length=tokens_of(self._pipeline.transformer.config),
        )
        return text, pooled
