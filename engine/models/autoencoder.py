"""The autoencoder between pixels and latents, in float32 at every precision of the run.

Half of the published VAEs overflow in fp16 (SDXL's own does), and the fingerprint in the shards
must not depend on how a run computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from ..basics.errors import NumericsError

# Of one call of the VAE: its float32 activations, some 256 channels at full size in several copies,
# take gigabytes for each of the two 1024 x 1024 (eight 512 x 512) images that these are.
MAX_PIXELS = 2**21
# Log variance of latents that are no posterior's: the least that diffusers gives one. What is drawn
# from it is the mean.
NO_VARIANCE = -30.0


class Autoencoder:
    """Images to scaled latents and back: ``latents = (z - shift) * scale``, z what the VAE makes.

    Latents are (N, C, h, w) float32; an image is ``scale_factor`` times as high and wide.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae
        self.channels, self.scale_factor = vae_sizes(vae.config)
        self.scaling_factor = float(vae.config["scaling_factor"])
        self.shift_factor = float(vae.config.get("shift_factor") or 0.0)
        self._processor = VaeImageProcessor(vae_scale_factor=self.scale_factor)

    def latent_shape(self, resolution: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) of an image of (height, width) pixels."""
        height, width = resolution
        return self.channels, height // self.scale_factor, width // self.scale_factor

    def pixel_shape(self, latents: Tensor) -> tuple[int, int]:
        """(height, width) in pixels of latents (..., h, w)."""
        height, width = latents.shape[-2:]
        return height * self.scale_factor, width * self.scale_factor

    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Latents of images of one size.

        They are the posterior's mean, not a sample: an image met twice has one latent, and the
        noise of the VAE's posterior is far below that of almost every timestep.
        """
        return self.latents(self.moments(pixels_of(images)))

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """The posterior of images uint8 (N, 3, H, W): mean and log variance (N, 2C, h, w)."""
        parts = []
        for part in pixels.to(self.vae.device).split(self._images_a_call(pixels.shape[-2:])):
            encoded = self.vae.encode(part.float() / 127.5 - 1)
            parts.append(torch.cat(_posterior(encoded), dim=1).float())
        return torch.cat(parts)

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents of posteriors (N, 2C, h, w): the mean, or with standard normal ``noise``
        (N, C, h, w) a sample.
        """
        mean, log_variance = moments.float().chunk(2, dim=1)
        z = mean if noise is None else mean + (0.5 * log_variance).exp() * noise
        return (z - self.shift_factor) * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Images of latents of any float type; NumericsError where one would be black NaN."""
        if not latents.isfinite().all():
            raise NumericsError(
                "the denoiser made latents that are NaN or infinite: it overflows at this "
                "precision (prepare.precision, train.precision), take bf16 or fp32, or its weights "
                "are broken",
                "denoiser",
                "non-finite",
            )
        unscaled = latents.float() / self.scaling_factor + self.shift_factor
        parts = unscaled.split(self._images_a_call(self.pixel_shape(latents)))
        pixels = torch.cat([self.vae.decode(part).sample for part in parts])
        if not pixels.isfinite().all():
            raise NumericsError(
                "the VAE makes NaN of finite latents: its weights are broken or overflowed when "
                "they were stored, name another one as model.vae",
                "model.vae",
                "non-finite",
            )
        return self._processor.postprocess(pixels, output_type="pil")

    def _images_a_call(self, resolution: Sequence[int]) -> int:
        height, width = resolution
        return max(1, MAX_PIXELS // (height * width))


def _posterior(encoded: Any) -> list[Tensor]:
    """Mean and log variance of what an autoencoder makes of images."""
    if "latent_dist" in encoded:
        return [encoded.latent_dist.mean, encoded.latent_dist.logvar]
    return [encoded.latent, torch.full_like(encoded.latent, NO_VARIANCE)]


def vae_sizes(vae: Mapping[str, Any]) -> tuple[int, int]:
    """Of a VAE's config: channels of its latents, and pixels along a side of one."""
    blocks = vae.get("block_out_channels") or vae["encoder_block_out_channels"]
    return int(vae["latent_channels"]), int(2 ** (len(blocks) - 1))


def pixels_of(images: Sequence[Image.Image]) -> Tensor:
    """Images of one size as uint8 (N, 3, H, W)."""
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)
