"""What shards hold of candidates: latents or moments, encoded once each and kept in a file a prompt
until the shards are written; or their pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from .basics.errors import DataError
from .basics.failpoints import failpoint
from .basics.files import atomic_file
from .basics.keyed import content_id
from .candidates import CandidateSet
from .models import Backbone
from .models.autoencoder import pixels_of
from .shards.contents import Kind


class PixelStore:
    """Pixels, by prompt and candidate, as the candidates hold them."""

    def __init__(self, images: CandidateSet) -> None:
        self._cached = lru_cache(maxsize=256)(images.read)

    def pair(self, prompt: str, winner: int, loser: int) -> np.ndarray:
        """uint8 (2, H, W, 3): winner, then loser."""
        images = self._cached(prompt)
        return np.stack([np.asarray(images[index]) for index in (winner, loser)])


class LatentStore:
    """Scaled latents or moments in fp16, by prompt and candidate."""

    def __init__(
        self,
        folder: Path,
        images: CandidateSet,
        vae: str,
        kind: Literal["latents", "moments"] = "latents",
    ) -> None:
        self.folder = folder
        self.kind = kind
        self.images = images
        self.vae = vae
        folder.mkdir(parents=True, exist_ok=True)
        self._cached = lru_cache(maxsize=256)(self._load)

    def encode(
        self, backbone: Backbone, prompt: str, candidates: Sequence[int], batch_size: int
    ) -> None:
        """Encode these candidates of a prompt unless they are on disk: the same images and VAE."""
        made_of = {
            "vae": self.vae,
            "kind": self.kind,
            "images": self.images.fingerprint,
            "candidates": ",".join(map(str, candidates)),
        }
        if self._is_done(prompt, made_of):
            return
        images = self.images.read(prompt)
        chosen = [images[index] for index in candidates]
        parts = [
            shard_images(self.kind, backbone, chosen[start : start + batch_size], repr(prompt))
            for start in range(0, len(chosen), batch_size)
        ]
        tensors = {"latents": torch.cat(parts), "candidates": torch.as_tensor(candidates)}
        with atomic_file(self._path(prompt)) as file:
            file.write(save(tensors, metadata=made_of))
        failpoint("prepare.latents")

    def pair(self, prompt: str, winner: int, loser: int) -> np.ndarray:
        """fp16 (2, C, h, w), 2C channels of moments: winner, then loser."""
        by_candidate = self._cached(prompt)
        return torch.stack([by_candidate[winner], by_candidate[loser]]).numpy()

    def _load(self, prompt: str) -> dict[int, Tensor]:
        tensors = load_file(self._path(prompt))
        return dict(zip(tensors["candidates"].tolist(), tensors["latents"], strict=True))

    def _is_done(self, prompt: str, made_of: dict[str, str]) -> bool:
        try:
            with safe_open(self._path(prompt), framework="pt") as file:
                return bool(file.metadata() == made_of)
        except (OSError, SafetensorError):
            return False

    def _path(self, prompt: str) -> Path:
        return self.folder / f"{content_id(prompt):016x}.safetensors"


def shard_images(kind: Kind, backbone: Backbone, images: Sequence[Image.Image], of: str) -> Tensor:
    """What shards of a kind hold of N images, in host memory: latents (N, C, h, w) or moments
    (N, 2C, h, w) in fp16, or pixels (N, H, W, 3) uint8.

    DataError, naming what they are ``of``, where fp16 cannot hold them.
    """
    if kind == "raw":
        return pixels_of(images).permute(0, 2, 3, 1).contiguous()
    if kind == "moments":
        encoded = backbone.image_moments(pixels_of(images))
    else:
        encoded = backbone.encode_images(images)
    half = encoded.cpu().half().contiguous()
    if not half.isfinite().all():
        raise DataError(
            f"{kind} of {of} overflow half precision or are NaN: name a VAE that is safe in half "
            "precision as model.vae"
        )
    return half
