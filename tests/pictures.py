"""Pictures that tests draw, and the noise that tiny models draw theirs from."""

import numpy as np
import torch
from PIL import Image, ImageDraw


def draw_picture(size: int = 32, hue: int = 0) -> Image.Image:
    image = Image.new("RGB", (size, size), "white")
    color = f"hsl({hue * 47 % 360}, 70%, 50%)"
    ImageDraw.Draw(image).ellipse((size // 8, size // 8, size - size // 8, size // 2), fill=color)
    return image


def pixels(images: list[Image.Image]) -> np.ndarray:
    """(N, H, W, C) uint8."""
    return np.stack([np.asarray(image) for image in images])


def noise(count: int, height: int = 8, width: int = 8, seed: int = 0) -> torch.Tensor:
    """(N, 4, H, W) for a tiny denoiser."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, height, width, generator=generator)
