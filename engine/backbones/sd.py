"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet, a KL autoencoder.

Takes any folder or hub id in diffusers' `StableDiffusionPipeline` layout, with epsilon or v
prediction. Sampling runs the stock pipeline with DDIM, so what we rank is what users draw.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, ModelMixin, StableDiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from ..errors import OutsideError
from ..recipe import Model
from .ddpm import DiscreteDDPM
from .pretrained import reading, refuse_missing_weights
from .protocol import Conditioning, NoiseProcess

PIPELINE_MULTIPLE = 8  # diffusers refuses other sizes, also where VAE and UNet would take them


class StableDiffusion:
    """The frozen parts of the model, and the calls that take a denoiser (policy or reference)."""

    def __init__(self, pipeline: StableDiffusionPipeline, device: torch.device) -> None:
        self.device = device
        self.pipeline = pipeline.to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
            part.requires_grad_(False).eval()
        self.denoiser: ModelMixin = pipeline.unet
        self.noise: NoiseProcess = DiscreteDDPM(pipeline.scheduler, device)
        self._prompt_cache: dict[str, Tensor] = {}

    @classmethod
    def load(cls, spec: Model, device: torch.device, dtype: torch.dtype) -> StableDiffusion:
        """Read the pipeline of a recipe; OutsideError names the folder and what it lacks."""
        for library in (diffusers, transformers):
            library.utils.logging.disable_progress_bar()
        parts = {}
        if spec.vae is not None:
            with reading(f"model.vae={spec.vae}", "VAE"):
                parts["vae"] = AutoencoderKL.from_pretrained(spec.vae, dtype=torch.float32)
                refuse_missing_weights(parts["vae"], "VAE")
        with reading(f"model.path={spec.path}", "Stable Diffusion model"):
            pipeline = StableDiffusionPipeline.from_pretrained(
                spec.path,
                # The VAE stays in float32 at every precision: half of them overflow in fp16, and
                # its fingerprint must not depend on how a run computes.
                dtype={"vae": torch.float32, "default": dtype},
                safety_checker=None,
                requires_safety_checker=False,
                revision=spec.revision,
                variant=spec.variant,
                **parts,
            )
            for name, part in (("UNet", pipeline.unet), ("VAE", pipeline.vae)):
                refuse_missing_weights(part, name)
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
        backbone = cls(pipeline, device)
        backbone.check_resolution(spec.resolution)
        return backbone

    def check_resolution(self, resolution: tuple[int, int]) -> None:
        """OutsideError if the UNet cannot halve latents of this size often enough."""
        height, width = resolution
        halvings = len(self.denoiser.config["down_block_types"]) - 1
        factor = math.lcm(self.vae_scale * 2**halvings, PIPELINE_MULTIPLE)
        if height % factor or width % factor:
            raise OutsideError(
                f"model.resolution={height}x{width} does not fit this model: both must be "
                f"multiples of {factor}"
            )

    @property
    def vae_scale(self) -> int:
        """Pixels along one side of a latent pixel."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def scaling_factor(self) -> float:
        """What the VAE's latents are multiplied by."""
        return float(self.pipeline.vae.config["scaling_factor"])

    def latent_shape(self, resolution: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) of an image of (height, width) pixels."""
        height, width = resolution
        channels = int(self.pipeline.vae.config["latent_channels"])
        return channels, height // self.vae_scale, width // self.vae_scale

    def fingerprints(self) -> dict[str, str]:
        """Content hashes of the denoiser and the VAE, whatever their files look like."""
        return {
            "model": fingerprint(self.pipeline.unet),
            "vae": fingerprint(self.pipeline.vae),
        }

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        # The posterior's mean, not a sample: an image met twice has one latent, and the noise of
        # the VAE's posterior is far below that of almost every timestep.
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
        batch = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2)
        batch = batch.float() / 127.5 - 1
        return self.pipeline.vae.encode(batch).latent_dist.mean.float() * self.scaling_factor

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._prompt_cache]
        if missing:
            tokens = self.pipeline.tokenizer(
                missing,
                padding="max_length",
                max_length=self.pipeline.tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            hidden = self.pipeline.text_encoder(tokens.input_ids.to(self.device))[0]
            self._prompt_cache.update(zip(missing, hidden, strict=True))
        return Conditioning(torch.stack([self._prompt_cache[prompt] for prompt in prompts]))

    def predict(
        self, net: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        dtype = next(net.parameters()).dtype
        return net(
            noisy.to(dtype),
            timesteps,
            encoder_hidden_states=conditioning.text.to(dtype),
            return_dict=False,
        )[0]

    @torch.no_grad()
    def sample(
        self,
        net: nn.Module,
        prompts: Sequence[str],
        noise: Tensor,
        *,
        steps: int,
        guidance: float,
    ) -> list[Image.Image]:
        # A shallow copy with its own scheduler: `net` may be the policy, and DDIM keeps state.
        pipeline = copy.copy(self.pipeline)
        pipeline.unet = net
        pipeline.scheduler = DDIMScheduler.from_config(self.pipeline.scheduler.config)
        dtype = next(net.parameters()).dtype
        height, width = (side * self.vae_scale for side in noise.shape[-2:])
        latents = pipeline(
            prompt_embeds=self.encode_prompts(prompts).text.to(dtype),
            negative_prompt_embeds=self.encode_prompts([""] * len(prompts)).text.to(dtype),
            latents=noise.to(self.device, dtype),
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=height,
            width=width,
            output_type="latent",
        ).images
        pixels = pipeline.vae.decode(latents.float() / self.scaling_factor).sample
        return pipeline.image_processor.postprocess(pixels, output_type="pil")

    def load_adapter(self, folder: Path) -> None:
        """Load a LoRA in diffusers' format into the denoiser, as any user of it would."""
        self.pipeline.load_lora_weights(folder)


def fingerprint(module: nn.Module) -> str:
    """sha256 over names and float32 values of a module's state: the same for any file format."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
