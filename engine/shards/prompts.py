"""Embeddings of prompts beside the shards, so that training needs no text encoder.

Each file is safetensors, and holds of a prompt as many tensors as its family has columns, a row of
`models.text.PromptCache` each, under the sha256 of the prompt and the number of the column.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..basics.errors import DataError, ShardError, told_by
from ..basics.files import replacing
from ..basics.numbers import is_finite
from .manifest import FileEntry, Manifest, PromptFile, StoredText
from .store import ShardStore, check_against

FILE_BYTES = 2**29  # of tensors, which are in memory twice while they are written
Row = tuple[Tensor, ...]
Sizes = tuple[int | None, ...]
"""Of a tensor; None is any size from 1 on."""
DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}  # of precisions, as safetensors says them
REMEDY = "remove the file and run prepare again, or use data.text=live"


def key_of(prompt: str) -> str:
    """What a prompt is stored under, before the number of a column."""
    return hashlib.sha256(prompt.encode()).hexdigest()


def write_prompts(folder: Path, stem: str, rows: Iterable[tuple[str, Row]]) -> list[PromptFile]:
    """Write prompts, each given once, and their rows to ``folder`` as files of about
    :data:`FILE_BYTES`, which are named by ``stem`` and a number. DataError when the disk is full.
    """
    files: list[PromptFile] = []
    for tensors in _parts(rows):
        path = folder / f"{stem}-{len(files):05d}.safetensors"
        with replacing(path) as file:
            file.write(save(tensors))
        files.append(PromptFile(name=path.name, bytes=file.bytes, sha256=file.sha256))
    return files


def _parts(rows: Iterable[tuple[str, Row]]) -> Iterator[dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    size = 0
    for prompt, row in rows:
        key = key_of(prompt)
        for column, value in enumerate(row):
            tensors[f"{key}.{column}"] = value.cpu().contiguous()
            size += value.nbytes
        if size >= FILE_BYTES:
            yield tensors
            tensors, size = {}, 0
    if tensors:
        yield tensors


class _File(NamedTuple):
    path: str
    tensors: Any


class PromptFiles:
    """The stored prompts of a set, mapped into memory: what is read of them is what is asked for.

    Every file is checked against the manifest that should be by this process, which is number
    ``share`` of ``shares`` that open the set: DataError names the first that is missing or damaged,
    or holds other numbers than finite ones of the set's precision.
    """

    def __init__(
        self, store: ShardStore, stored: StoredText, share: int = 0, shares: int = 1
    ) -> None:
        self.location = store.location
        self.fingerprint = stored.fingerprint
        store.check_present(stored.files)
        self._files: dict[str, _File] = {}
        for number, entry in enumerate(stored.files):
            verified = number % shares == share
            file = _File(store.name_of(entry), _open(store, entry, verified=verified))
            if verified:
                _refuse_other_numbers(file, stored.precision)
            self._files |= dict.fromkeys(file.tensors.keys(), file)

    def __contains__(self, prompt: str) -> bool:
        return f"{key_of(prompt)}.0" in self._files

    def row(self, prompt: str) -> Row:
        """The tensors of a prompt; DataError if they are not stored."""
        if prompt not in self:
            raise DataError(
                f"data.text=stored: {prompt[:200]!r} is not among the prompts in {self.location}: "
                "run prepare again with this recipe, or use data.text=live",
                "data.text",
                "missing",
            )
        return tuple(file.tensors.get_tensor(name) for name, file in self._columns(key_of(prompt)))

    def hold_to(self, columns: Sequence[Sizes]) -> None:
        """DataError, which names the file, unless every prompt has a tensor of each of these sizes,
        and no more.
        """
        for name, file in self._files.items():
            key, _, column = name.rpartition(".")
            if column != "0":
                continue
            row = self._columns(key)
            found = [tuple(file.tensors.get_slice(name).get_shape()) for name, file in row]
            if len(found) != len(columns) or not all(map(_fits, found, columns)):
                raise DataError(
                    f"{file.path}: of the prompt whose sha256 is {key[:12]}… it holds "
                    f"{_told(found)}, where the model's text encoders make {_told(columns)}: "
                    f"{REMEDY}",
                    file.path,
                    "mismatch",
                )

    def _columns(self, key: str) -> Iterator[tuple[str, _File]]:
        for column in count():
            name = f"{key}.{column}"
            if name not in self._files:
                return
            yield name, self._files[name]


def _fits(found: tuple[int, ...], sizes: Sizes) -> bool:
    return len(found) == len(sizes) and all(
        there >= 1 if size is None else there == size
        for there, size in zip(found, sizes, strict=True)
    )


def _told(shapes: Sequence[Sizes]) -> str:
    of = (", ".join("n" if size is None else str(size) for size in sizes) for sizes in shapes)
    return f"tensors of {' and '.join(f'[{sizes}]' for sizes in of)}"


def _refuse_other_numbers(file: _File, precision: str) -> None:
    for name in file.tensors.keys():  # noqa: SIM118  (it is no dictionary)
        dtype = file.tensors.get_slice(name).get_dtype()
        if dtype != DTYPES.get(precision):
            raise DataError(
                f"{file.path}: {name} is {dtype}, where the manifest says that the prompts were "
                f"embedded in {precision}: {REMEDY}",
                file.path,
                "mismatch",
            )
        if not is_finite(file.tensors.get_tensor(name)):
            raise DataError(
                f"{file.path}: {name} holds NaN or infinity: {REMEDY}",
                file.path,
                "non-finite",
            )


def stored_in(manifest: Manifest, store: ShardStore, precision: str) -> StoredText:
    """What the manifest says of stored prompts; DataError unless they are there, and embedded in
    ``precision``, which is a run's.
    """
    stored = manifest.text
    if stored is None:
        raise DataError(
            f"data.text=stored, but no prompts are stored in {store.location}: run prepare with "
            "data.text=stored, or use data.text=live",
            "data.text",
            "missing",
        )
    if stored.precision != precision:
        raise DataError(
            f"data.text=stored: the prompts in {store.location} were embedded in "
            f"{stored.precision}, where train.precision={precision}: run prepare again with it, "
            "or use data.text=live",
            "train.precision",
            "mismatch",
        )
    return stored


def _open(store: ShardStore, entry: FileEntry, *, verified: bool) -> Any:
    try:
        return _opened(store, entry, verified=verified)
    except ShardError:
        if not store.discard(entry):
            raise
    return _opened(store, entry, verified=verified)  # fetched once more


def _opened(store: ShardStore, entry: FileEntry, *, verified: bool) -> Any:
    name, descriptor = store.name_of(entry), store.open(entry)
    try:
        with open(descriptor, "rb", buffering=0) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest() if verified else None
            check_against(entry, name, os.fstat(descriptor).st_size, found)
            # By its descriptor: a cache may give up the file meanwhile. The mapping keeps it.
            return safe_open(f"/dev/fd/{descriptor}", "pt")
    except (OSError, SafetensorError) as error:
        raise ShardError(name, f"cannot be read: {told_by(error)}", kind="unreadable") from None
