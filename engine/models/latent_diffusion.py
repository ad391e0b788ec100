"""A denoiser in the latents of a KL autoencoder, driven through its stock diffusers pipeline.

Families differ in how they tell the denoiser what to draw (a :class:`~.text.TextConditioner`), how
it is called (an :data:`Ask`, for a UNet :func:`ask_unet`) and in their noise process; the rest is
here. Sampling runs the stock pipeline with the scheduler that it
was loaded with, so what we rank is what users draw.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from PIL import Image
from torch import Tensor, nn

from ..basics.keyed import content_id
from .autoencoder import Autoencoder
from .fingerprint_store import Kept
from .fingerprints import fingerprints_of, quantized_parts
from .masking import PromptMask
from .pipelines import TEXT_ENCODERS
from .pretrained import denoiser_in
from .protocol import Conditioning, Framing, NoiseProcess, StoredPrompts
from .quantization import Kind, Quantized, quantize
from .text import TextConditioner

# Extras of a Conditioning that diffusers' UNet wants under `added_cond_kwargs`.
ADDED_CONDITIONS = ("text_embeds", "time_ids")
GUIDANCE = "guidance"  # the extra that holds what denoisers are told that embed it, (N,)
Ask = Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]
"""(denoiser, noisy (N, C, h, w) in its dtype, timesteps (N,), conditioning of N) -> prediction."""
DrawLatents = Callable[..., Tensor]
"""(stock pipeline, noise (N, C, h, w), guidance, its other arguments) -> latents of that shape."""
Teacher = tuple[ModelMixin, Mapping[str, str]]
"""A network, and the fingerprints of its parts."""


class LatentDiffusion:
    """The frozen parts of the model, and the calls that take a denoiser (policy or reference)."""

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        text: TextConditioner,
        noise: NoiseProcess,
        device: torch.device,
        ask: Ask | None = None,
        draw: DrawLatents | None = None,
        *,
        load_teacher: Callable[[], Teacher] | None = None,
        own_parts: Mapping[str, str] | None = None,
    ) -> None:
        """``ask`` calls the denoiser, if that is no UNet, and ``draw`` the pipeline, if its latents
        or guidance are not as Stable Diffusion's; ``own_parts`` are fingerprints that the pipeline
        does not tell any more.
        """
        self.device = device
        self.pipeline = pipeline
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        self.denoiser_name = denoiser_in(pipeline.components)
        self.denoiser: ModelMixin = getattr(pipeline, self.denoiser_name)
        self._ask = ask or ask_unet
        self._draw = draw or draw_latents
        self.vae = Autoencoder(pipeline.vae)
        self.noise = noise
        self._text = text
        self._load_teacher = load_teacher
        self.files: Kept | None = None
        self.quantized: Quantized | None = None
        self._own_parts = dict(own_parts or {})
        self._parts: dict[str, str] | None = None
        self._teacher_parts: Mapping[str, str] = {}

    @property
    def scaling_factor(self) -> float:
        """What the VAE's latents are multiplied by."""
        return self.vae.scaling_factor

    def latent_shape(self, resolution: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) of an image of (height, width) pixels."""
        return self.vae.latent_shape(resolution)

    def fingerprints(self) -> dict[str, str]:
        """Content hashes of all parts as they were loaded, whatever their files look like."""
        if self._parts is None:
            self._parts = self.files.read() if self.files is not None else None
        if self._parts is None:
            trained = any(parameter.requires_grad for parameter in self.denoiser.parameters())
            assert not trained, "fingerprints are taken before a policy is made of the denoiser"
            self._parts = fingerprints_of(self.pipeline) | self._own_parts
            if self.files is not None:
                self.files.keep(self._parts)
        return {
            **self._parts,
            **quantized_parts(self.quantized.kind if self.quantized else None),
            **self._teacher_parts,
        }

    def take_prompts(self, stored: StoredPrompts, told: Mapping[str, tuple[int, ...]]) -> None:
        stored.hold_to(self._text.sizes(told))
        for name in TEXT_ENCODERS:
            if name in self.pipeline.components:
                self.pipeline.register_modules(**{name: None})
        self._own_parts["text"] = stored.fingerprint
        self._text.cache.read_from(stored, self.device)

    def embedded(self, prompts: Sequence[str]) -> list[tuple[Tensor, ...]]:
        return self._text.cache.rows_of(prompts)

    def place(self, quantization: Kind | None = None) -> None:
        if quantization is not None:
            self.fingerprints()  # of the denoiser as its files have it
            self.quantized = quantize(self.denoiser, quantization, self.device)
        self.pipeline.to(self.device)

    def load_teacher(self) -> ModelMixin | None:
        """The frozen diffusion model a consistency model was distilled from; None for others."""
        if self._load_teacher is None:
            return None
        teacher, self._teacher_parts = self._load_teacher()
        return teacher.to(self.device)

    def load_adapter(self, folder: Path) -> None:
        """Load a LoRA in diffusers' format into the denoiser, as any user of it would."""
        self.pipeline.load_lora_weights(folder)
        self.denoiser.eval()  # peft's new layers are in training mode, with the adapter's dropout

    def load_denoiser(self, folder: Path) -> None:
        """Take the denoiser of another pipeline folder, in the precision of this one."""
        dtype = next(self.denoiser.parameters()).dtype
        other = type(self.denoiser).from_pretrained(
            folder, subfolder=self.denoiser_name, dtype=dtype
        )
        if self.quantized is not None:
            quantize(other, self.quantized.kind, self.device)
        self.use_denoiser(other.to(self.device).requires_grad_(False).eval())

    def use_denoiser(self, net: ModelMixin) -> None:
        """Work with this network of the same kind from now on."""
        self.denoiser = net
        setattr(self.pipeline, self.denoiser_name, net)

    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        return self.vae.encode(images)

    def image_moments(self, pixels: Tensor) -> Tensor:
        return self.vae.moments(pixels)

    def latents_of(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.vae.latents(moments, noise)

    def encode_prompts(
        self, prompts: Sequence[str], framing: Framing | None = None
    ) -> Conditioning:
        return self._text.encode(prompts, framing)

    def seen_tokens(self, prompt: str) -> int | None:
        return self._text.seen_tokens(prompt)

    def limit_prompt_cache(self, num_bytes: int) -> None:
        self._text.cache.budget = num_bytes

    def predict(
        self, net: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        dtype = next(net.parameters()).dtype
        return self._ask(net, noisy.to(dtype), timesteps, conditioning)

    @torch.no_grad()
    def sample(
        self,
        net: nn.Module,
        prompts: Sequence[str],
        noise: Tensor,
        *,
        steps: int,
        guidance: float,
        mask: PromptMask | None = None,
    ) -> list[Image.Image]:
        # A shallow copy with its own scheduler: `net` may be the policy, and samplers keep state.
        pipeline = copy.copy(self.pipeline)
        setattr(pipeline, self.denoiser_name, net)
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        dtype = next(net.parameters()).dtype
        embeddings = self._text.pipeline_inputs(prompts)
        if mask is not None:
            embeddings = mask.apply(embeddings)
        height, width = self.vae.pixel_shape(noise)
        latents = self._draw(
            pipeline,
            noise.to(self.device, dtype),
            guidance,
            **{name: _cast(value, dtype) for name, value in embeddings.items()},
            generator=_generators(noise),
            num_inference_steps=steps,
            height=height,
            width=width,
            output_type="latent",
        )
        return self.vae.decode(latents)


def _cast(value: Tensor | Sequence[Tensor], dtype: torch.dtype) -> Tensor | list[Tensor]:
    return value.to(dtype) if isinstance(value, Tensor) else [row.to(dtype) for row in value]


def draw_latents(pipeline: Any, noise: Tensor, guidance: float, **given: Any) -> Tensor:
    """What the stock pipeline makes of noise."""
    latents: Tensor = pipeline(latents=noise, guidance_scale=guidance, **given).images
    return latents


def packed(latents: Tensor) -> Tensor:
    """Latents (N, C, h, w) as tokens (N, h/2 * w/2, 4C), each of 2 x 2 of them."""
    patches = latents.unfold(2, 2, 2).unfold(3, 2, 2)  # (N, C, h/2, w/2, 2, 2)
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """What :func:`packed` makes tokens (N, L, 4C) of: latents (N, C, height, width)."""
    patches = tokens.unflatten(1, (height // 2, width // 2)).unflatten(3, (-1, 2, 2))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def ask_unet(
    net: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
) -> Tensor:
    """What a UNet predicts."""
    extras = conditioning.extras
    # The UNet casts these itself, after the sinusoids of the time ids: bfloat16 would round the
    # ids (1023 pixels to 1024).
    added = {name: extras[name] for name in ADDED_CONDITIONS if name in extras}
    # Networks that are told no guidance, diffusion models and LCM-LoRAs, have no width for it.
    config: Any = net.config
    width, guided = config["time_cond_proj_dim"], None
    if width is not None and GUIDANCE in extras:
        guided = guidance_embedding(extras[GUIDANCE], width).to(noisy.dtype)
    prediction: Tensor = net(
        noisy,
        timesteps,
        encoder_hidden_states=conditioning.text.to(noisy.dtype),
        timestep_cond=guided,
        added_cond_kwargs=added or None,
        return_dict=False,
    )[0]
    return prediction


def guidance_embedding(guidance: Tensor, width: int) -> Tensor:
    """Sines and cosines (N, width) float32 of 1000 w, as LCMs are told their guidance weight w.

    Source: Luo et al., arXiv 2310.04378; the frequencies are those of diffusers' pipelines.
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=guidance.device) / (half - 1)
    angles = 1000 * guidance.float()[:, None] * torch.exp(-math.log(10_000) * exponents)
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, width % 2))


def _generators(noise: Tensor) -> list[torch.Generator]:
    """One for each image, for samplers that add noise between steps: a function of its first noise.

    An image is then the same in whatever batch, on whatever rank it is drawn.
    """
    seeds = (content_id(row.cpu().float().numpy().tobytes().hex()) for row in noise)
    return [torch.Generator().manual_seed(seed) for seed in seeds]
