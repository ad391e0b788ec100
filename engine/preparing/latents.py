"""What shards hold of images: latents, moments or pixels, encoded once each and kept in a file a
part until the shards are written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..basics.errors import DataError
from ..basics.failpoints import failpoint
from ..basics.files import replacing
from ..display.terminal import Terminal
from ..models import Backbone
from ..models.autoencoder import pixels_of
from ..ranks import Ranks
from ..shards.contents import Kind, flaw_of
from ..sources.pictures import Picture, Size, Tolerance
from .parts import Parts, do_missing, part_of
from .scores import batches

Framing = tuple[Size, Size]
"""(height, width) of the original, (top, left) of the crop."""


class Pixels:
    """Pixels as the parts have them: nothing is encoded or kept."""

    remarks: Mapping[int, Sequence[tuple[str, str]]] = {}
    """They are images of our own: there is nothing to say of them."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._cached = lru_cache(maxsize=256)(self._load)

    def image(self, image: int) -> tuple[np.ndarray, Framing]:
        """uint8 (H, W, 3), and its framing."""
        record, place = divmod(image, self.parts.each)
        picture = self._cached(record)[place]
        return np.asarray(picture.image), (picture.original, picture.crop)

    def digests(self, image: int) -> tuple[int, ...]:
        """Of its pixels: equal pictures have equal ones."""
        return (digest_of(self.image(image)[0]),)

    def _load(self, record: int) -> tuple[Picture, ...]:
        part = part_of(self.parts, record)
        [loaded] = self.parts.load(part, [record - int(self.parts.starts[part])])
        return loaded.pictures


def digest_of(values: np.ndarray) -> int:
    """63 bits of the sha256 of pixels or latents, to which -0 is 0."""
    return int.from_bytes(hashlib.sha256((values + 0).tobytes()).digest()[:8], "big") >> 1


def shard_images(kind: Kind, backbone: Backbone, images: Sequence[Image.Image], of: str) -> Tensor:
    """What shards of a kind hold of N images, in host memory: latents (N, C, h, w) or moments
    (N, 2C, h, w) in fp16, or pixels (N, H, W, 3) uint8.

    DataError, naming what they are ``of``, where fp16 cannot hold them or they are of no image.
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
            "precision as model.vae",
            "model.vae",
            "non-finite",
        )
    for kind_of_flaw, reason in filter(None, map(flaw_of, half.numpy())):
        told = f"{kind} of {of} {reason}: name the VAE of this model as model.vae"
        raise DataError(told, "model.vae", kind_of_flaw)
    return half


class Latents:
    """Scaled latents or moments in fp16, or pixels, of images by their number."""

    def __init__(self, folder: Path, parts: Parts, vae: str, kind: Kind = "latents") -> None:
        self.folder = folder
        self.parts = parts
        self.kind: Kind = kind
        height, width = parts.resolution
        self.made_of = {
            "vae": vae,
            "kind": kind,
            "source": parts.content,
            "resolution": f"{height}x{width}",
            "layout": "4",
        }
        self.remarks: dict[int, Sequence[tuple[str, str]]] = {}
        """Of images that were read, by number: what there is to say, with a detail."""
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
        firsts = self.parts.starts * self.parts.each
        ends = np.searchsorted(images, firsts)
        wanted = {
            part: images[ends[part] : ends[part + 1]] - firsts[part]
            for part in range(len(firsts) - 1)
            if ends[part] < ends[part + 1]
        }
        missing = ranks.on_first(lambda: [n for n in wanted if not self._is_done(n, wanted[n])])
        own = tolerance.copy()

        def encode(part: int) -> None:
            self._encode_part(backbone, part, wanted[part], batch_size, own)
            failpoint("prepare.latents")

        sizes = {part: len(asked) for part, asked in wanted.items()}
        do_missing("encode", sizes, missing, encode, ranks, terminal)
        return self._unreadable(wanted, tolerance)

    def image(self, image: int) -> tuple[np.ndarray, Framing]:
        """What the shards hold of an image, such as fp16 (C, h, w) of latents; its framing."""
        file, _, row = self._find(image)
        height, width, top, left = file.get_slice("framing")[row].tolist()
        return file.get_slice("latents")[row], ((height, width), (top, left))

    def digests(self, image: int) -> tuple[int, ...]:
        """Of its pixels and of what the shards hold of it: two that are alike in either are one to
        training, and equal pixels in other batches need not give equal latents.
        """
        _, digests, row = self._find(image)
        return tuple(digests[row].tolist())

    def _find(self, image: int) -> tuple[Any, np.ndarray, int]:
        """The file and the digests of an image's part, and its row in both."""
        part = part_of(self.parts, image // self.parts.each)
        file, images, digests = self._opened(part)
        return file, digests, int(np.searchsorted(images, image - self._first(part)))

    def _encode_part(
        self,
        backbone: Backbone,
        part: int,
        images: np.ndarray,
        batch_size: int,
        tolerance: Tolerance,
    ) -> None:
        latents, framings, encoded, digests = [], [], [], []
        problems: dict[int, str] = {}
        remarks: dict[int, Sequence[tuple[str, str]]] = {}
        first = int(self.parts.starts[part])

        def wanted() -> Iterator[tuple[int, Picture]]:
            each, asked = self.parts.each, set(images.tolist())
            for record in self.parts.load(part, np.unique(images // each).tolist()):
                if record.problem is not None:
                    problems[first + record.index] = record.problem
                    tolerance.note(first + record.index, record.problem)
                numbered = enumerate(record.pictures, record.index * each)
                yield from ((image, picture) for image, picture in numbered if image in asked)

        for batch in batches(wanted(), batch_size):
            pictures = [picture for _, picture in batch]
            encoded += [image for image, _ in batch]
            remarks |= {image: picture.remarks for image, picture in batch if picture.remarks}
            framings += [(*picture.original, *picture.crop) for picture in pictures]
            name = self.parts.describe(part)
            shown = [picture.image for picture in pictures]
            latents.append(shard_images(self.kind, backbone, shown, name))
            digests += [
                (digest_of(np.asarray(image)), digest_of(own))
                for image, own in zip(shown, latents[-1].numpy(), strict=True)
            ]
        tensors = {
            "latents": torch.cat(latents) if latents else torch.zeros(0),
            "framing": torch.tensor(framings, dtype=torch.int32).reshape(-1, 4),
            "images": torch.tensor(encoded, dtype=torch.int64),
            "digests": torch.tensor(digests, dtype=torch.int64).reshape(-1, 2),
        }
        said = {"problems": problems, "remarks": remarks}
        metadata = self._metadata(images) | {name: json.dumps(what) for name, what in said.items()}
        with replacing(self._path(part)) as file:
            file.write(save(tensors, metadata=metadata))

    def _unreadable(self, wanted: dict[int, np.ndarray], tolerance: Tolerance) -> np.ndarray:
        lost = [np.zeros(0, np.int64)]
        for part, images in wanted.items():
            with safe_open(self._path(part), framework="np") as file:
                problems = json.loads(file.metadata()["problems"])
                remarks = json.loads(file.metadata()["remarks"])
                lost.append(np.setdiff1d(images, file.get_tensor("images")) + self._first(part))
            for record, problem in problems.items():
                tolerance.note(int(record), problem)
            for image, said in remarks.items():
                self.remarks[self._first(part) + int(image)] = said
        return np.concatenate(lost)

    def _first(self, part: int) -> int:
        return int(self.parts.starts[part]) * self.parts.each

    def _open(self, part: int) -> tuple[Any, np.ndarray, np.ndarray]:
        file = safe_open(self._path(part), framework="np")
        return file, file.get_tensor("images"), file.get_tensor("digests")

    def _metadata(self, images: np.ndarray) -> dict[str, str]:
        return self.made_of | {"images": hashlib.sha256(images.tobytes()).hexdigest()}

    def _is_done(self, part: int, images: np.ndarray) -> bool:
        try:
            with safe_open(self._path(part), framework="pt") as file:
                found = file.metadata()
        except (OSError, SafetensorError):
            return False
        return bool((found or {}).items() >= self._metadata(images).items())

    def _path(self, part: int) -> Path:
        return self.folder / f"{self.parts.file_name(part)}.safetensors"
