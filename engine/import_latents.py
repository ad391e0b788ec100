"""Second pass over an imported data set: the images of its pairs as latents, or whatever the shards
are to hold of them, a file a part, until the shards are written.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .basics.failpoints import failpoint
from .basics.files import atomic_file
from .display.terminal import Terminal
from .import_scores import batches
from .latents import shard_images
from .models import Backbone
from .ranks import Ranks
from .shards.contents import Kind
from .sources.index import Index
from .sources.pictures import Picture, Size, Tolerance, load_records
from .sources.rows import RowReader

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
        with atomic_file(self._path(number)) as file:
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
