"""What shards hold of candidates: latents or moments, encoded once each and kept in a file a prompt
until the shards are written; or their pixels.

Second pass over an imported data set: the images of its pairs as latents, or whatever the shards
are to hold of them, a file a part, until the shards are written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from ..basics.errors import DataError
from ..basics.failpoints import failpoint
from ..basics.files import replacing
from ..basics.keyed import content_id
from ..display.terminal import Terminal
from ..models import Backbone
from ..models.autoencoder import pixels_of
from ..ranks import Ranks
from ..shards.contents import Kind
from ..sources.index import Index
from ..sources.pictures import Picture, Size, Tolerance, load_records
from ..sources.rows import RowReader
from .candidates import CandidateSet
from .scores import batches


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
        with replacing(self._path(prompt)) as file:
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


Framing = tuple[Size, Size]


class PictureLatents:
    """Latents, moments or pixels of images by their number, with size and crop of the original."""

    def __init__(
        self,
        folder: Path,
        index: Index,
        reader: RowReader,
        resolution: Size,
        vae: str,
        kind: Kind = "latents",
    ) -> None:
        self.folder = folder
        self.kind: Kind = kind
        self.index = index
        self.reader = reader
        self.resolution = resolution
        self.images_each = len(reader.images)
        self.made_of = {
            "vae": vae,
            "kind": kind,
            "source": index.facts.content,
            "resolution": f"{resolution[0]}x{resolution[1]}",
        }
        self._opened = lru_cache(maxsize=64)(self._open)

    def run(
        self,
        backbone: Backbone,
        images: np.ndarray,
        batch_size: int,
        ranks: Ranks,
        tolerance: Tolerance,
        terminal: Terminal,
    ) -> np.ndarray:
        """Encode these images (numbers, rising) but what is on disk; returns on every rank the
        numbers of those that cannot be read.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        ends = np.searchsorted(images, self.index.starts * self.images_each)
        wanted = {
            number: images[ends[number] : ends[number + 1]]
            for number in range(self.index.num_parts)
            if ends[number] < ends[number + 1]
        }
        missing = ranks.on_first(lambda: [n for n in wanted if not self._is_done(n, wanted[n])])
        total = len(images)
        done = total - sum(len(wanted[number]) for number in missing)
        own = tolerance.copy()
        with terminal.progress("encode", total, done, "images") as progress:
            for number in ranks.until_stopped(ranks.share(missing)):
                self._encode_part(backbone, number, wanted[number], batch_size, own)
                failpoint("prepare.latents")
                encoded = len(wanted[number]) * ranks.world_size
                progress.advance(min(encoded, total - progress.done))
        ranks.meet()
        return self._unreadable(wanted, tolerance)

    def latents(self, image: int) -> np.ndarray:
        """What the shards hold of an image: fp16 (C, h, w) of latents."""
        file, row = self._find(image)
        return file.get_slice("latents")[row]

    def framing(self, image: int) -> Framing:
        """(height, width) of the original, (top, left) of the crop."""
        file, row = self._find(image)
        height, width, top, left = file.get_slice("framing")[row].tolist()
        return (height, width), (top, left)

    def _encode_part(
        self,
        backbone: Backbone,
        number: int,
        images: np.ndarray,
        batch_size: int,
        tolerance: Tolerance,
    ) -> None:
        part = self.index.part(number)
        records = np.unique(images // self.images_each) - part.first
        latents, framings, encoded = [], [], []
        problems: list[str] = []
        loaded = load_records(self.reader, part, records.tolist(), self.resolution)
        for batch in batches(loaded, max(1, batch_size // self.images_each)):
            pictures: list[Picture] = []
            for record in batch:
                if record.problem is not None:
                    problems.append(record.problem)
                    tolerance.note(record.problem)
                first = (part.first + record.index) * self.images_each
                pictures += record.pictures
                encoded += [first + place for place in range(len(record.pictures))]
            if pictures:
                framings += [(*picture.original, *picture.crop) for picture in pictures]
                name = self.reader.files.name(part.file)
                latents.append(
                    shard_images(self.kind, backbone, [picture.image for picture in pictures], name)
                )
        tensors = {
            "latents": torch.cat(latents) if latents else torch.zeros(0),
            "framing": torch.tensor(framings, dtype=torch.int32).reshape(-1, 4),
            "images": torch.tensor(encoded, dtype=torch.int64),
        }
        metadata = self._metadata(images) | {"problems": json.dumps(problems)}
        with replacing(self._path(number)) as file:
            file.write(save(tensors, metadata=metadata))

    def _unreadable(self, wanted: dict[int, np.ndarray], tolerance: Tolerance) -> np.ndarray:
        lost = [np.zeros(0, np.int64)]
        for number, images in wanted.items():
            with safe_open(self._path(number), framework="np") as file:
                problems = json.loads(file.metadata()["problems"])
                lost.append(np.setdiff1d(images, file.get_tensor("images")))
            for problem in problems:
                tolerance.note(problem)
        return np.concatenate(lost)

    def _find(self, image: int) -> tuple[Any, int]:
        """The open file that an image is in, and its row."""
        number = self.index.part_of(image // self.images_each)
        file, images = self._opened(number)
        return file, int(np.searchsorted(images, image))

    def _open(self, number: int) -> tuple[Any, np.ndarray]:
        file = safe_open(self._path(number), framework="np")
        return file, file.get_tensor("images")

    def _metadata(self, images: np.ndarray) -> dict[str, str]:
        return self.made_of | {"images": hashlib.sha256(images.tobytes()).hexdigest()}

    def _is_done(self, number: int, images: np.ndarray) -> bool:
        try:
            with safe_open(self._path(number), framework="pt") as file:
                found = file.metadata()
        except (OSError, SafetensorError):
            return False
        return bool(found.items() >= self._metadata(images).items())

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:08d}.safetensors"
