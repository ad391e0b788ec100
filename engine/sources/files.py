"""Which files a data set consists of."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..basics.errors import DataError

Kind = Literal["parquet", "tar", "csv", "folder"]
TABLES: tuple[Kind, ...] = ("parquet", "tar", "csv")


@dataclass(frozen=True)
class SourceFiles:
    """The files of a data set, all of one kind, in the order of their names.

    A `folder` of winners and losers counts as one file, the folder itself.
    """

    kind: Kind
    root: Path
    paths: tuple[Path, ...]
    passed_over: tuple[tuple[str, str], ...] = ()
    """Other files that lie there: name and why each is not read."""

    def name(self, number: int) -> str:
        """What a file is called inside the data set, wherever that lies."""
        return self.paths[number].relative_to(self.root).as_posix()

    def signature(self) -> list[list[str | int]]:
        """Name, size and time of change of each file: while it stays the same, so do they."""
        paths: Iterable[Path] = self.paths
        if self.kind == "folder":
            paths = sorted(path for path in self.paths[0].rglob("*") if path.is_file())
        found: list[list[str | int]] = []
        for path in paths:
            status = path.stat()
            name = path.relative_to(self.root).as_posix()
            found.append([name, status.st_size, status.st_mtime_ns])
        return found


def find_files(path: str, image_folders: tuple[str, ...] | None = None) -> SourceFiles:
    """The files that ``prepare.source.path`` names: one, a folder's, or those of a pattern.

    A folder that holds all ``image_folders`` is one of images. DataError when there is nothing to
    read, or several kinds of it.
    """
    where = f"prepare.source.path={path}"
    place = Path(path)
    if place.is_dir():
        if image_folders and all((place / name).is_dir() for name in image_folders):
            return SourceFiles("folder", place.parent, (place,))
        found = [inner for inner in place.rglob("*") if not _is_hidden(inner, place)]
    elif place.exists():
        found = [place]
    else:
        found = [Path(name) for name in glob.glob(path, recursive=True)]
        if not found:
            told = f"{where}: there is no such file or folder, nor one of that pattern"
            raise DataError(told, "prepare.source.path", "missing")
    kinds: dict[str, list[Path]] = {kind: [] for kind in TABLES}
    for file in sorted(found):
        if file.is_file() and file.suffix[1:] in kinds:
            kinds[file.suffix[1:]].append(file)
    return _of_one_kind(where, kinds, image_folders)


def _of_one_kind(
    where: str, kinds: dict[str, list[Path]], image_folders: tuple[str, ...] | None
) -> SourceFiles:
    present = [kind for kind in TABLES if kinds[kind]]
    if len(present) > 1:
        counts = ", ".join(f"{len(kinds[kind])} {kind}" for kind in present)
        told = f"{where}: holds {counts} files: name one kind, e.g. PATH/*.{present[0]}"
        raise DataError(told, "prepare.source.path", "ambiguous")
    if not present:
        folders = f", nor folders {' and '.join(image_folders)}" if image_folders else ""
        raise DataError(
            f"{where}: holds no .parquet, .tar or .csv files{folders}",
            "prepare.source.path",
            "empty",
        )
    paths = kinds[present[0]]
    root = Path(os.path.commonpath([file.parent for file in paths]))
    return SourceFiles(present[0], root, tuple(paths))


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)
