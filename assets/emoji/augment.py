"""Augmentations for the two CLIP models, and others that neither has seen, to test them with.

All take pixels (N, 3, 32, 32) in 0..1 and a generator, draw anew for every image, and paint what
comes in from outside white. Reward and judge share only the VAE bank of `train_clip.py`; there are
no flips, since many captions name a side.
"""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F


def uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """(n, 1, 1, 1) numbers between low and high."""
    return torch.rand(n, 1, 1, 1, generator=generator) * (high - low) + low


def warp(pixels: Tensor, matrices: Tensor) -> Tensor:
    """Sample each image through its own 2x3 affine matrix."""
    grid = F.affine_grid(matrices, list(pixels.shape), align_corners=False)
    return 1 - F.grid_sample(1 - pixels, grid, align_corners=False)


def turned(n: int, angle: float, zoom: float, shift: float, generator: torch.Generator) -> Tensor:
    """Random rotation (radians), zoom (log scale) and shift (pixels) as 2x3 matrices."""
    a, z = uniform(n, -angle, angle, generator), uniform(n, -zoom, zoom, generator).exp()
    move = (torch.rand(n, 2, 1, generator=generator) * 2 - 1) * shift / 16
    rows = torch.cat([a.cos() * z, -a.sin() * z, a.sin() * z, a.cos() * z], dim=1)
    return torch.cat([rows.view(n, 2, 2), move], dim=2)


def blur(pixels: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of five taps."""
    taps = torch.arange(-2.0, 3.0).square().div(-2 * sigma * sigma).exp()
    kernel = (taps / taps.sum()).view(1, 1, 1, 5).repeat(3, 1, 1, 1)
    padded = F.pad(pixels, (2, 2, 2, 2), value=1.0)
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)


def some(chance: float, changed: Tensor, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """The changed image with the given chance, else the image as it was."""
    return torch.where(uniform(len(pixels), 0, 1, generator) < chance, changed, pixels)


def for_reward(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Small rotations, zooms and shifts; brightness, contrast and saturation."""
    n = len(pixels)
    pixels = some(0.8, warp(pixels, turned(n, 0.15, 0.1, 2.5, generator)), pixels, generator)
    grey = pixels.mean(dim=1, keepdim=True)
    pixels = grey + (pixels - grey) * uniform(n, 0.6, 1.4, generator)
    pixels = 0.5 + (pixels - 0.5) * uniform(n, 0.7, 1.2, generator)
    return (pixels + uniform(n, -0.1, 0.1, generator)).clamp(0, 1)


def for_judge(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Crops stretched to full size, blur, tinted paper, noise and cut-out squares."""
    n = len(pixels)
    zoom = torch.rand(n, 2, generator=generator) * 0.25 + 0.75
    move = (torch.rand(n, 2, generator=generator) * 2 - 1) * (1 - zoom)
    crop = torch.cat([torch.diag_embed(zoom), move[:, :, None]], dim=2)
    pixels = some(0.7, warp(pixels, crop), pixels, generator)
    pixels = some(0.3, blur(pixels, 0.8), pixels, generator)
    pixels = pixels * (1 - 0.25 * torch.rand(n, 3, 1, 1, generator=generator).square())
    noise = torch.randn(pixels.shape, generator=generator) * uniform(n, 0, 0.08, generator)
    rows = torch.arange(32).view(1, 1, 32, 1) - uniform(n, -8, 32, generator)
    columns = torch.arange(32).view(1, 1, 1, 32) - uniform(n, -8, 32, generator)
    hole = (rows > 0) & (rows < 8) & (columns > 0) & (columns < 8)
    return (pixels + noise).masked_fill(hole, 0.5).clamp(0, 1)


def jpeg(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """JPEG of quality 15 to 40: at 32x32 this leaves heavy blocks and wrong colours."""
    qualities = torch.randint(15, 41, (len(pixels),), generator=generator).tolist()
    images = []
    for image, quality in zip((pixels * 255).byte(), qualities, strict=True):
        memory = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(memory, "JPEG", quality=quality)
        images.append(np.asarray(Image.open(memory)).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(images)).float() / 255


def shear(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Slanted by up to 0.25 along one axis."""
    n = len(pixels)
    matrices = torch.eye(2, 3).repeat(n, 1, 1)
    slant = torch.rand(n, generator=generator) * 0.5 - 0.25
    along_x = torch.rand(n, generator=generator) < 0.5
    matrices[:, 0, 1], matrices[:, 1, 0] = slant * along_x, slant * ~along_x
    return warp(pixels, matrices)


def posterise(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Four levels a channel."""
    return (pixels * 3).round() / 3


def pepper(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Every twelfth pixel becomes a random colour."""
    hit = torch.rand(len(pixels), 1, 32, 32, generator=generator) < 1 / 12
    return torch.where(hit, torch.rand(pixels.shape, generator=generator), pixels)


def wave(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Rows pushed sideways by a sine of 1.3 pixels."""
    n = len(pixels)
    grid = F.affine_grid(torch.eye(2, 3).repeat(n, 1, 1), list(pixels.shape), align_corners=False)
    phase = uniform(n, 0, 2 * math.pi, generator).view(n, 1, 1)
    push = 1.3 / 16 * torch.sin(grid[..., 1] * 6 + phase)
    grid = torch.stack([grid[..., 0] + push, grid[..., 1]], dim=-1)
    return 1 - F.grid_sample(1 - pixels, grid, align_corners=False)


def gamma(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Exponents between 0.5 and 2."""
    return (
        pixels.clamp(min=1e-4) ** uniform(len(pixels), -math.log(2), math.log(2), generator).exp()
    )


UNSEEN = {f.__name__: f for f in (jpeg, shear, posterise, pepper, wave, gamma)}
