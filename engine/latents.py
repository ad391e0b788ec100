"""Latents of candidates, encoded once each: a file a prompt, until the shards are written."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from .backbones import Backbone
from .candidates import CandidateSet
from .errors import DataError
from .failpoints import failpoint
from .keyed import content_id
from .shards.atomic import atomic_file


class LatentStore:
    """Scaled latents in fp16, by prompt and candidate."""

    def __init__(self, folder: Path, images: CandidateSet, vae: str) -> None:
        self.folder = folder
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
            "images": self.images.fingerprint,
            "candidates": ",".join(map(str, candidates)),
        }
        if self._is_done(prompt, made_of):
            return
        images = self.images.read(prompt)
        chosen = [images[index] for index in candidates]
        parts = [
            backbone.encode_images(chosen[start : start + batch_size])
            for start in range(0, len(chosen), batch_size)
        ]
        latents = half_latents(torch.cat(parts).cpu(), repr(prompt))
        tensors = {"latents": latents, "candidates": torch.as_tensor(candidates)}
        with atomic_file(self._path(prompt)) as file:
            file.write(save(tensors, metadata=made_of))
        failpoint("prepare.latents")

    def pair(self, prompt: str, winner: int, loser: int) -> np.ndarray:
        """fp16 (2, C, h, w): winner, then loser."""
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


def half_latents(latents: Tensor, of: str) -> Tensor:
    """Latents in fp16; DataError, naming what they are ``of``, where that cannot hold them."""
    half = latents.half().contiguous()
    if not half.isfinite().all():
        raise DataError(
            f"latents of {of} overflow half precision or are NaN: name a VAE that is safe in half "
            "precision as model.vae"
        )
    return half
