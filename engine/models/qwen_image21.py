"""Qwen-Image 2.1 (Alibaba's Qwen team): a text and an image as one sequence, causal but for the
image, in a transformer of 7 B parameters.

Takes any folder or hub id in diffusers' `QwenImage21Pipeline` layout, to draw from text alone. Each
latent is a token, of a VAE whose images have an alpha channel and are 16 times as large; the
transformer is told time as 0 to 1 and the size of the image, and predicts the velocity, noise
minus latents. Its text are the states of a Qwen3-VL's last layer, before its norm, of a prompt in a
template of the pipeline, however long.

The image stands behind the text, padding included: beside a longer prompt it would be drawn
elsewhere. So the transformer is asked about one image at a time, in training and in sampling, and
each is told its own text alone.

It is meant to be drawn without guidance, which takes a second pass. Nothing is said by a space, as
diffusers does: the empty prompt is read as one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..recipe import Model
from .checks import Config, check_text_widths, check_transformer
from .flow_matching import FlowMatching
from .latent_diffusion import LatentDiffusion
from .pipelines import load_pipeline
from .protocol import Conditioning
from .text import Encoders, OwnLengthText, Told

TOKENS = 512  # that a dry run counts with: the stock pipeline reads prompts of any length
SLOT = 4  # tokens of an image, 2 x 2, that count as one when its place is told


def load(
    spec: Model, device: torch.device, dtype: torch.dtype, *, reads_text: bool = True
) -> LatentDiffusion:
    """The model a recipe names; OutsideError tells what is wrong with its folder."""
    pipeline = load_pipeline(spec, dtype, reads_text=reads_text, check=check, check_text=check_text)
    side = pipeline.vae_scale_factor
    noise = FlowMatching(pipeline.scheduler, device, spec.resolution, side, spec.sigmas)
    return LatentDiffusion(pipeline, QwenImage21Text(pipeline), noise, device, ask, draw)


def check(spec: Model, transformer: Config, vae: Config) -> None:
    """OutsideError unless latents and the resolution go together."""
    check_transformer(spec, vae, channels={"in_channels": transformer["in_channels"]}, patch=2)


def check_text(spec: Model, transformer: Config, texts: Mapping[str, Any]) -> None:
    """OutsideError unless a text encoder of this config gives what the transformer takes."""
    width = texts["text_encoder"].get_text_config().hidden_size
    check_text_widths(spec, transformer, context_in_dim=width)


def told(transformer: Config, encoders: Encoders) -> Told:
    """Sizes of text and extras."""
    return {"text": (TOKENS, transformer["context_in_dim"])}


def ask(net: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """The velocity it predicts."""
    text = conditioning.text.to(noisy.dtype)
    times = timesteps.to(noisy.dtype) / 1000  # as the pipeline rounds it
    lengths = conditioning.lengths or [text.shape[1]] * len(noisy)
    rows = [
        _ask_of_one(net, *row)
        for row in zip(noisy.split(1), times.split(1), text.split(1), lengths, strict=True)
    ]
    return torch.cat(rows)


def _ask_of_one(net: nn.Module, noisy: Tensor, time: Tensor, text: Tensor, length: int) -> Tensor:
    height, width = noisy.shape[-2:]
    # Of a dry run on the host: it reads the layout of the sequence.
    device = None if noisy.is_meta else noisy.device
    is_image = torch.arange(length + height * width // SLOT, device=device) >= length
    prediction: Tensor = net(
        noisy.flatten(2).mT,
        encoder_hidden_states=text[:, :length],
        timestep=time,
        img_shapes=[[(1, height, width)]],
        img_mask=is_image[None],
        return_dict=False,
    )[0]
    return prediction[:, length:].mT.unflatten(2, (height, width))


def draw(pipeline: Any, noise: Tensor, guidance: float, **given: Any) -> Tensor:
    """Guidance is its `true_cfg`; a folder's own noise levels are for as many steps as they are."""
    own, steps = pipeline.config["sample_sigmas"], given["num_inference_steps"]
    if own is not None and len(own) != steps:
        given["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    each = [given.pop(name) for name in ("prompt_embeds", "negative_prompt_embeds", "generator")]
    drawn = []
    for start, text, nothing, generator in zip(noise.split(1), *each, strict=True):
        told = {"negative_prompt_embeds": nothing[None]} if guidance > 1 else {}
        (tokens,) = pipeline(
            latents=start.flatten(2).mT,
            prompt_embeds=text[None],
            true_cfg_scale=guidance,
            generator=generator,
            **told,
            **given,
        ).images
        drawn.append(tokens.mT.unflatten(1, noise.shape[-2:]))
    return torch.stack(drawn)


class QwenImage21Text(OwnLengthText):
    """What a Qwen3-VL makes of a prompt, without the template's beginning."""

    def _embed_anew(self, prompts: list[str]) -> tuple[Tensor]:
        # On the pipeline's device, and not the encoder's, which may wait in host memory.
        text, _, _ = self._pipeline.encode_prompt(prompts, device=self._pipeline.device)
        return (text,)
