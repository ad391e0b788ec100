"""Small preference data on disk, in every form that `prepare.source` reads."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from PIL import Image

CAPTIONS = ["red apple", "grinning face", "cat face", "blue car", "house"]


@dataclass(frozen=True)
class Judged:
    """A row of the Pick-a-Pic form."""

    jpg_0: bytes
    jpg_1: bytes
    label_0: float | None
    caption: str
    image_0_uid: str
    image_1_uid: str
    best_image_uid: str


def picture(seed: int, size: tuple[int, int] = (20, 24), kind: str = "PNG") -> bytes:
    """An encoded image of (height, width): smooth, so that JPEG changes it little."""
    grid = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grid).resize(size[::-1], Image.Resampling.BICUBIC).save(buffer, format=kind)
    return buffer.getvalue()


def judged(number: int, label: float | None = None, **changes: Any) -> Judged:
    """Row ``number``: without a label given, winners change sides and every fifth row is a tie."""
    if label is None:
        label = 0.5 if number % 5 == 4 else float(number % 2)
    ids = (f"image-{2 * number}", f"image-{2 * number + 1}")
    values = {
        "jpg_0": picture(2 * number),
        "jpg_1": picture(2 * number + 1),
        "label_0": label,
        "caption": f"{CAPTIONS[number % len(CAPTIONS)]} {number // 7}",
        "image_0_uid": ids[0],
        "image_1_uid": ids[1],
        "best_image_uid": "tie" if label == 0.5 else ids[int(label == 0)],
    }
    return Judged(**values | changes)


def write_parquet(path: Path, rows: Sequence[Judged], per_group: int = 16) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([vars(row) for row in rows])
    pq.write_table(table, path, row_group_size=per_group)
    return path


def write_tar(path: Path, rows: Sequence[Judged]) -> Path:
    """As webdataset writes it by itself: with pax headers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, webdataset.TarWriter(file, encoder=False) as tar:
        for number, row in enumerate(rows):
            record = {key: value for key, value in vars(row).items() if not key.startswith("jpg")}
            members = {"jpg_0": row.jpg_0, "jpg_1": row.jpg_1, "json": json.dumps(record).encode()}
            tar.write({"__key__": f"{number:06d}", **members})
    return path


def write_plain_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_csv(path: Path, rows: Sequence[Judged]) -> Path:
    """Winner and loser as paths beside the table; ties have neither and are left out."""
    (path.parent / "images").mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["winner", "loser", "caption", "note"])
        for row in rows:
            if row.label_0 in (0, 1):
                names = [f"images/{uid}.png" for uid in (row.image_0_uid, row.image_1_uid)]
                for name, data in zip(names, (row.jpg_0, row.jpg_1), strict=True):
                    (path.parent / name).write_bytes(data)
                table.writerow([*(names if row.label_0 else names[::-1]), row.caption, "a,\n b"])
    return path


def write_folder(path: Path, rows: Sequence[Judged]) -> Path:
    for name in ("winner", "loser", "caption"):
        (path / name).mkdir(parents=True)
    for number, row in enumerate(rows):
        if row.label_0 in (0, 1):
            images = (row.jpg_0, row.jpg_1) if row.label_0 else (row.jpg_1, row.jpg_0)
            for name, data in zip(("winner", "loser"), images, strict=True):
                (path / name / f"{number:04d}.png").write_bytes(data)
            (path / "caption" / f"{number:04d}.txt").write_text(row.caption + "\n")
    return path


def write_ranked(path: Path, captions: int = 4, images: int = 6, *, scores: bool = True) -> Path:
    """Parquet of images with scores, the captions mixed."""
    rows = [
        {
            "image": {"bytes": picture(17 * caption + image), "path": None},
            "caption": CAPTIONS[caption],
            **({"score": float((7 * image + caption) % images)} if scores else {}),
        }
        for image in range(images)
        for caption in range(captions)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5)
    return path
