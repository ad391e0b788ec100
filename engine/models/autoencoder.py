"""The autoencoder between pixels and latents, in float32 at every precision of the run.

Half of the published VAEs overflow in fp16 (SDXL's own does), and the fingerprint in the shards
must not depend on how a run computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle

from ..basics.errors import NumericsError
from ..basics.transfer import send

# Of one call of the VAE: its float32 activations, some 256 channels at full size in several copies,
# take gigabytes for each of the two 1024 x 1024 (eight 512 x 512) images that these are.
MAX_PIXELS = 2**21
# Log variance of latents that are no posterior's: the least that diffusers gives one. What is drawn
# from it is the mean.
NO_VARIANCE = -30.0
Arithmetic = Callable[..., Tensor]


class Autoencoder:
    """Images to scaled latents and back: ``latents = (z - shift) * scale``, z what the VAE makes.

    Latents are (N, C, h, w) float32; an image is ``scale_factor`` times as high and wide. What is
    made for videos, as Qwen-Image's, makes one of one frame, and has a shift and a scale for each
    channel; that of 2.1 is given images as opaque, and what it makes of alpha is left out. So has
    FLUX.2's, whose latents are told in patches of 2 x 2: four times the channels.
    """

    def __init__(self, vae: ModelMixin) -> None:
        self.vae: Any = vae
        config: Any = vae.config
        self.channels, self.scale_factor = vae_sizes(config)
        self._makes_videos = is_of_videos(config)
        self._alpha = int(has_alpha(config))
        self._patch = patch_of(config)
        self.scaling_factor = float(config.get("scaling_factor") or 1.0)
        self._shift, self._scale, divides = normalisation_of(vae)
        self._scaled: Arithmetic = torch.div if divides else torch.mul
        self._unscaled: Arithmetic = torch.mul if divides else torch.div
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
            images = pad(part.float() / 127.5 - 1, (0, 0, 0, 0, 0, self._alpha), value=1.0)
            encoded = self.vae.encode(images.unsqueeze(2) if self._makes_videos else images)
            posterior = _posterior(encoded)
            if self._makes_videos:
                posterior = [of.squeeze(2) for of in posterior]
            moments = [pixel_unshuffle(of, self._patch) for of in posterior]
            parts.append(torch.cat(moments, dim=1).float())
        return torch.cat(parts)

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents of posteriors (N, 2C, h, w): the mean, or with standard normal ``noise``
        (N, C, h, w) a sample.
        """
        mean, log_variance = moments.float().chunk(2, dim=1)
        z = mean if noise is None else mean + (0.5 * log_variance).exp() * noise
        shift, scale = self._normalisation(z.device)
        return self._scaled(z - shift, scale)

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
        shift, scale = self._normalisation(latents.device)
        unscaled = pixel_shuffle(self._unscaled(latents.float(), scale) + shift, self._patch)
        if self._makes_videos:
            unscaled = unscaled.unsqueeze(2)
        parts = unscaled.split(self._images_a_call(self.pixel_shape(latents)))
        pixels = torch.cat([self.vae.decode(part).sample for part in parts])
        pixels = pixels.squeeze(2) if self._makes_videos else pixels
        if not pixels.isfinite().all():
            raise NumericsError(
                "the VAE makes NaN of finite latents: its weights are broken or overflowed when "
                "they were stored, name another one as model.vae",
                "model.vae",
                "non-finite",
            )
        return self._processor.postprocess(pixels[:, :3], output_type="pil")

    def _normalisation(self, device: torch.device) -> list[Any]:
        """Shift and scale: numbers, which round as the stock pipeline's, or (C, 1, 1)."""
        both = self._shift, self._scale
        return [send(of, device) if isinstance(of, Tensor) else of for of in both]

    def _images_a_call(self, resolution: Sequence[int]) -> int:
        height, width = resolution
        return max(1, MAX_PIXELS // (height * width))


def _posterior(encoded: Any) -> list[Tensor]:
    """Mean and log variance of what an autoencoder makes of images."""
    if "latent_dist" in encoded:
        return [encoded.latent_dist.mean, encoded.latent_dist.logvar]
    return [encoded.latent, torch.full_like(encoded.latent, NO_VARIANCE)]


def vae_sizes(vae: Mapping[str, Any]) -> tuple[int, int]:
    """Of a VAE's config: channels of latents as denoisers take them, and pixels along a side."""
    if is_of_videos(vae):
        return int(vae["z_dim"]), int(2 ** len(vae["temperal_downsample"]))
    blocks = vae.get("block_out_channels") or vae["encoder_block_out_channels"]
    patch = patch_of(vae)
    return int(vae["latent_channels"]) * patch**2, int(2 ** (len(blocks) - 1)) * patch


def normalisation_of(vae: Any) -> tuple[float | Tensor, float | Tensor, bool]:
    """What is taken from a VAE's latents, what they are scaled by, each a number or (C, 1, 1), and
    whether that is a divisor: as the stock pipelines have it, for a factor rounds otherwise.
    """
    config = vae.config
    if patch_of(config) > 1:
        norm = (vae.bn.running_mean, vae.bn.running_var)
        mean, variance = (of.cpu().view(-1, 1, 1) for of in norm)
        return mean, (variance + config["batch_norm_eps"]).sqrt(), True
    if is_of_videos(config):
        statistics = (config["latents_mean"], config["latents_std"])
        mean, std = (torch.tensor(of).view(-1, 1, 1) for of in statistics)
        return (mean, std, True) if has_alpha(config) else (mean, 1.0 / std, False)
    shift, scale = config.get("shift_factor"), config.get("scaling_factor")
    return float(shift or 0.0), float(scale or 1.0), False


def has_alpha(vae: Mapping[str, Any]) -> bool:
    """Whether a VAE of this config is given images with an alpha channel."""
    return vae.get("in_channels") == 4


def is_of_videos(vae: Mapping[str, Any]) -> bool:
    """Whether a VAE of this config makes videos."""
    return "temperal_downsample" in vae


def patch_of(vae: Mapping[str, Any]) -> int:
    """How many latents along a side are told as one, with a channel for each, and normalised by
    the statistics of a batch norm: of FLUX.2's VAE 2, of others 1.
    """
    return int(vae["patch_size"][0]) if "batch_norm_eps" in vae else 1


def pixels_of(images: Sequence[Image.Image]) -> Tensor:
    """Images of one size as uint8 (N, 3, H, W)."""
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)
