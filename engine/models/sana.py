"""SANA (Xie et al., arXiv 2410.10629): linear attention, on latents that are 32 times smaller.

Takes any folder or hub id in diffusers' `SanaPipeline` layout: 0.6 and 1.6 billion parameters,
SANA 1.5 among them. The transformer is told time as 0 to 1000 times its `timestep_scale`, and
predicts the velocity, noise minus latents; those are of a deep-compression autoencoder.

Its text are 300 tokens of a Gemma 2, with padding masked: of a prompt behind the instruction that
the stock pipeline puts before it, and of the empty prompt, which guides and stands for dropped
captions, without.

SANA-Sprint is not taken, though its transformer can be asked in this process: its outputs are those
of a consistency function on trigonometric flow, which a loss on velocities would undo.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import SanaPipeline
from torch import Tensor, nn

from ..basics.errors import OutsideError
from ..recipe import Model
from .checks import Config, check_text_widths, check_transformer, unet_key, unet_name
from .flow_matching import FlowMatching
from .latent_diffusion import LatentDiffusion
from .pipelines import load_pipeline
from .protocol import Conditioning, Framing
from .text import CachedText, Encoders, Told

TOKENS = 300  # of a prompt, as the stock pipeline has them
MASK = "encoder_attention_mask"  # the extra that is 1 at tokens and 0 at padding
INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"]


def load(
    spec: Model, device: torch.device, dtype: torch.dtype, *, reads_text: bool = True
) -> LatentDiffusion:
    """The model a recipe names; OutsideError tells what is wrong with its folder."""
    pipeline = load_pipeline(spec, dtype, reads_text=reads_text, check=check, check_text=check_text)
    side = pipeline.vae_scale_factor * pipeline.transformer.config["patch_size"]
    noise = FlowMatching(pipeline.scheduler, device, spec.resolution, side, spec.sigmas)
    return LatentDiffusion(pipeline, SanaText(pipeline), noise, device, ask, draw)


def check(spec: Model, transformer: Config, vae: Config) -> None:
    """OutsideError unless latents, patches and the resolution go together."""
    if transformer["guidance_embeds"]:
        raise OutsideError(
            f"{unet_name(spec)} embeds guidance: it is of SANA-Sprint, a consistency model that is "
            "not supported; give the SANA that it was distilled from",
            unet_key(spec),
            "unsupported",
        )
    channels = {end: transformer[end] for end in ("in_channels", "out_channels")}
    check_transformer(spec, vae, channels=channels, patch=transformer["patch_size"])


def told(transformer: Config, encoders: Encoders) -> Told:
    """Sizes of text and extras."""
    return {"text": (TOKENS, transformer["caption_channels"]), MASK: (TOKENS,)}


def check_text(spec: Model, transformer: Config, texts: Mapping[str, Any]) -> None:
    """OutsideError unless a text encoder of these configs gives what the transformer takes."""
    if "text_encoder" not in texts:
        raise OutsideError(
            f"model.path={spec.path} lacks its text encoder, a Gemma 2", "model.path", "unsupported"
        )
    width = texts["text_encoder"].hidden_size
    check_text_widths(spec, transformer, caption_channels=width)


def ask(net: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """The velocity it predicts."""
    config: Any = net.config
    prediction: Tensor = net(
        noisy,
        encoder_hidden_states=conditioning.text.to(noisy.dtype),
        encoder_attention_mask=conditioning.extras[MASK],
        timestep=timesteps * config["timestep_scale"],
        return_dict=False,
    )[0]
    return prediction


def draw(pipeline: Any, noise: Tensor, guidance: float, **given: Any) -> Tensor:
    """Of the size that is asked for, and not of the nearest one in the pipeline's list."""
    latents: Tensor = pipeline(
        latents=noise,
        guidance_scale=guidance,
        negative_prompt=None,  # its embeddings are given
        use_resolution_binning=False,
        **given,
    ).images
    return latents


class SanaText(CachedText):
    """Token embeddings (N, 300, D), and their mask (N, 300) in the same dtype."""

    columns = ("text", MASK)

    def encode(self, prompts: Sequence[str], framing: Framing | None) -> Conditioning:
        text, mask = self.cache(prompts)
        return Conditioning(text, {MASK: mask})

    def pipeline_inputs(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        text, mask = self.cache(prompts)
        negative, negative_mask = self.cache([""] * len(prompts))
        return {
            "prompt_embeds": text,
            "prompt_attention_mask": mask,
            "negative_prompt_embeds": negative,
            "negative_prompt_attention_mask": negative_mask,
        }

    def _readers(self) -> list[tuple[Any, int]]:
        return [(self._pipeline.tokenizer, TOKENS - 1)]  # one is the last of the instruction's

    def _embed_anew(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        text, mask, empty, empty_mask = self._pipeline.encode_prompt(
            prompts,
            device=self._pipeline.device,  # not the encoder's, which may wait in host memory
            max_sequence_length=TOKENS,
            complex_human_instruction=INSTRUCTION.default,
        )
        blank = torch.tensor([not prompt for prompt in prompts], device=text.device)
        text = torch.where(blank[:, None, None], empty, text)
        return text, torch.where(blank[:, None], empty_mask, mask).to(text.dtype)
