"""Qwen-Image (Alibaba's Qwen team): text and image in one transformer of 20 B parameters.

Takes any folder or hub id in diffusers' `QwenImagePipeline` layout. Latents are packed, 2 x 2 of
them a token; the transformer is told time as 0 to 1, the size of the image in tokens and which
tokens of the text are padding, and predicts the velocity, noise minus latents. Its text are the
last hidden states of a Qwen2.5-VL, of a prompt in a template of the pipeline: up to 512 tokens. Its
VAE is one of videos, and normalises each channel of its latents.

Guidance is a second pass whose sum is given the norm of the first, so an image of `guidance: 4`
is none of ordinary guidance. Nothing is said by a space, as diffusers does: the empty
prompt is read as one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..basics.transfer import send
from ..recipe import Model
from .checks import Config, check_text_widths, check_transformer
from .flow_matching import FlowMatching
from .latent_diffusion import LatentDiffusion, packed, unpacked
from .pipelines import load_pipeline
from .protocol import Conditioning
from .text import Encoders, LimitedText, Told


def load(
    spec: Model, device: torch.device, dtype: torch.dtype, *, reads_text: bool = True
) -> LatentDiffusion:
    """The model a recipe names; OutsideError tells what is wrong with its folder."""
    pipeline = load_pipeline(spec, dtype, reads_text=reads_text, check=check, check_text=check_text)
    side = 2 * pipeline.vae_scale_factor
    noise = FlowMatching(pipeline.scheduler, device, spec.resolution, side, spec.sigmas)
    return LatentDiffusion(pipeline, QwenImageText(pipeline), noise, device, ask, draw)


def check(spec: Model, transformer: Config, vae: Config) -> None:
    """OutsideError unless latents, patches and the resolution go together."""
    channels = {"a quarter of in_channels": transformer["in_channels"] // 4}
    check_transformer(spec, vae, channels=channels, patch=2)


def check_text(spec: Model, transformer: Config, texts: Mapping[str, Any]) -> None:
    """OutsideError unless a text encoder of this config gives what the transformer takes."""
    width = texts["text_encoder"].get_text_config().hidden_size
    check_text_widths(spec, transformer, joint_attention_dim=width)


def told(transformer: Config, encoders: Encoders) -> Told:
    """Sizes of text and extras."""
    return {"text": (QwenImageText.tokens, transformer["joint_attention_dim"])}


def ask(net: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """The velocity it predicts."""
    height, width = noisy.shape[-2:]
    text, lengths = conditioning.text.to(noisy.dtype), conditioning.lengths
    prediction = net(
        packed(noisy),
        encoder_hidden_states=text,
        encoder_hidden_states_mask=lengths and _mask(lengths, text),
        timestep=timesteps.to(noisy.dtype) / 1000,  # as the pipeline rounds it
        img_shapes=[[(1, height // 2, width // 2)]] * len(noisy),
        return_dict=False,
    )[0]
    return unpacked(prediction, height, width)


def draw(pipeline: Any, noise: Tensor, guidance: float, **given: Any) -> Tensor:
    """It takes texts of one length, with masks, and packed latents; guidance is its `true_cfg`."""
    told: dict[str, Any] = {}
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        rows = given.pop(name)
        if guidance > 1 or name == "prompt_embeds":
            told[name] = text = pad_sequence(rows, batch_first=True)
            told[f"{name}_mask"] = _is_own([len(row) for row in rows], text)
    tokens = pipeline(latents=packed(noise), true_cfg_scale=guidance, **told, **given).images
    return unpacked(tokens, *noise.shape[-2:])


def _mask(lengths: Sequence[int], text: Tensor) -> Tensor | None:
    """None without padding, as the stock pipeline: attention rounds otherwise under a mask."""
    return _is_own(lengths, text) if min(lengths) < text.shape[1] else None


def _is_own(lengths: Sequence[int], text: Tensor) -> Tensor:
    """(N, T) bool: which tokens of padded texts are not padding."""
    own = torch.arange(text.shape[1]) < torch.tensor(lengths)[:, None]
    return send(own, text.device)


class QwenImageText(LimitedText):
    """What a Qwen2.5-VL makes of a prompt, without the template's beginning."""

    tokens = 512  # that the stock pipeline takes, of 1024 that it reads

    @property
    def dropped(self) -> int:
        return int(self._pipeline.prompt_template_encode_start_idx)

    def in_template(self, prompt: str) -> str:
        template: str = self._pipeline.prompt_template_encode
        return template.format(prompt or " ")

    def _embed_anew(self, prompts: list[str]) -> tuple[Tensor]:
        text, _ = self._pipeline.encode_prompt(
            [prompt or " " for prompt in prompts],
            device=self._pipeline.device,  # not the encoder's, which may wait in host memory
            max_sequence_length=self.tokens,
        )
        return (text,)
