"""FLUX.2 dev and klein (Black Forest Labs): text and image in one transformer, no pooled embedding.

Takes any folder or hub id in diffusers' `Flux2Pipeline` (dev, 32 B parameters) or
`Flux2KleinPipeline` (klein, 4 and 9 B) layout. Its latents are those of a VAE in patches of 2 x 2,
normalised by the running statistics of the VAE's batch norm: each is a token, whose place has four
axes. The transformer is told time as 0 to 1 and predicts the velocity, noise minus latents. Its
text are 512 tokens, padding among them: of three layers of a Mistral 3 (dev) or a Qwen3 (klein),
side by side.

dev was distilled from guidance and is told a weight, in training `model.embedded_guidance`. klein
base is guided by a second pass, and klein, distilled to few steps, takes none.

The stock pipelines shift few steps further towards noise than many. Training draws from the grid
under the shift of the scheduler's own config, which is theirs for 200 steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from torch import Tensor, nn

from ..basics.errors import OutsideError
from ..recipe import Model
from .checks import Config, check_text_widths, check_transformer
from .flow_matching import FlowMatching
from .latent_diffusion import GUIDANCE, LatentDiffusion
from .pipelines import load_pipeline
from .protocol import Conditioning, Framing
from .text import CachedText, Encoders, Told

TOKENS = 512  # of a prompt in its template, as the stock pipelines have them
LAYERS = 3  # of the text encoder, side by side


def load(
    spec: Model, device: torch.device, dtype: torch.dtype, *, reads_text: bool = True
) -> LatentDiffusion:
    """The model a recipe names; OutsideError tells what is wrong with its folder."""
    pipeline = load_pipeline(spec, dtype, reads_text=reads_text, check=check, check_text=check_text)
    check_statistics(spec, pipeline.vae)
    side = 2 * pipeline.vae_scale_factor
    noise = FlowMatching(pipeline.scheduler, device, spec.resolution, side, spec.sigmas)
    text = Flux2Text(pipeline, spec.embedded_guidance)
    return LatentDiffusion(pipeline, text, noise, device, ask, draw)


def check(spec: Model, transformer: Config, vae: Config) -> None:
    """OutsideError unless latents and the resolution go together."""
    channels = {"in_channels": transformer["in_channels"]}
    check_transformer(spec, vae, channels=channels, patch=1)


def check_statistics(spec: Model, vae: Any) -> None:
    """OutsideError for a VAE whose batch norm has seen nothing: diffusers makes up what a file
    lacks.
    """
    norm = vae.bn
    key, path = ("model.vae", spec.vae) if spec.vae else ("model.path", spec.path)
    if not norm.running_mean.any() and (norm.running_var == 1).all():
        raise OutsideError(
            f"{key}={path}: the weights of its VAE lack the statistics that normalise latents, "
            "bn.running_mean and bn.running_var",
            key,
            "mismatch",
        )


def check_text(spec: Model, transformer: Config, texts: Mapping[str, Any]) -> None:
    """OutsideError unless a text encoder of this config gives what the transformer takes."""
    width = LAYERS * texts["text_encoder"].get_text_config().hidden_size
    check_text_widths(spec, transformer, joint_attention_dim=width)


def told(transformer: Config, encoders: Encoders) -> Told:
    """Sizes of text and extras."""
    return {"text": (TOKENS, transformer["joint_attention_dim"]), GUIDANCE: ()}


def ask(net: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """The velocity it predicts."""
    config: Any = net.config
    text = conditioning.text.to(noisy.dtype)
    height, width = noisy.shape[-2:]
    prediction: Tensor = net(
        noisy.flatten(2).mT,
        encoder_hidden_states=text,
        timestep=timesteps.to(noisy.dtype) / 1000,  # as the pipelines round it
        guidance=conditioning.extras[GUIDANCE] if config["guidance_embeds"] else None,
        img_ids=_places((1, height, width, 1), noisy.device),
        txt_ids=_places((1, 1, 1, text.shape[1]), noisy.device),
        return_dict=False,
    )[0]
    return prediction.mT.unflatten(2, (height, width))


def takes_guidance(transformer: Config, pipeline: Config) -> bool:
    """Whether it takes any: dev and klein base do, klein does not."""
    return bool(transformer["guidance_embeds"] or not pipeline.get("is_distilled"))


def draw(pipeline: Any, noise: Tensor, guidance: float, **given: Any) -> Tensor:
    """Tokens as the last step left them: klein's pipeline normalises no latents that it returns."""
    last: dict[str, Tensor] = {}

    def keep(_: Any, step: int, time: Tensor, made: dict[str, Tensor]) -> dict[str, Tensor]:
        last.update(made)
        return made

    pipeline(latents=noise, guidance_scale=guidance, callback_on_step_end=keep, **given)
    return last["latents"].mT.unflatten(2, noise.shape[-2:])


def _places(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """(L, 4) int64: where tokens are, in an image's frame, row and column, and in a text."""
    axes = (torch.arange(size, device=device) for size in sizes)
    return torch.cartesian_prod(*axes)


class Flux2Text(CachedText):
    """Three layers' token embeddings (N, 512, 3D), and dev's guidance of training."""

    def __init__(self, pipeline: Any, guidance: float) -> None:
        super().__init__(pipeline)
        self.cache.rows = 1  # padded to 512 tokens: fillers beside it would cost as much
        self._guidance = guidance
        self._is_klein = isinstance(pipeline, Flux2KleinPipeline)

    def encode(self, prompts: Sequence[str], framing: Framing | None) -> Conditioning:
        """Framing is nothing that this family is told of."""
        (text,) = self.cache(prompts)
        guidance = torch.full([len(prompts)], self._guidance, device=text.device)
        return Conditioning(text, {GUIDANCE: guidance})

    def pipeline_inputs(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """With negative ones where guidance is a second pass."""
        (text,) = self.cache(prompts)
        if not self._is_klein or self._pipeline.config["is_distilled"]:
            return {"prompt_embeds": text}
        (negative,) = self.cache([""] * len(prompts))
        return {"prompt_embeds": text, "negative_prompt_embeds": negative}

    def seen_tokens(self, prompt: str) -> int | None:
        read: str = self._in_template(prompt, tokenize=False)
        if len(read.encode()) <= TOKENS:
            return None  # a token has a byte at least
        ids = self._in_template(prompt, tokenize=True, return_dict=False)
        return TOKENS if len(ids) > TOKENS else None

    def _in_template(self, prompt: str, **how: bool) -> Any:
        """What the encoder reads, as text or as tokens."""
        template = self._pipeline.tokenizer.apply_chat_template
        if self._is_klein:
            turns = [{"role": "user", "content": prompt}]
            (found,) = template([turns], add_generation_prompt=True, enable_thinking=False, **how)
        else:
            turns = format_input([prompt], self._pipeline.system_message)
            (found,) = template(turns, add_generation_prompt=False, **how)
        return found

    def _embed_anew(self, prompts: list[str]) -> tuple[Tensor]:
        # On the pipeline's device, and not the encoder's, which may wait in host memory.
        text, _ = self._pipeline.encode_prompt(prompts, device=self._pipeline.device)
        return (text,)
