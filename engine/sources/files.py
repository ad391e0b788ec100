"""Which files a data set consists of."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal

from ..basics.errors import DataError
from ..recipe.identity import is_resolved

Kind = Literal["parquet", "tar", "csv", "jsonl", "json", "folder"]
TABLES: tuple[Kind, ...] = ("parquet", "tar", "csv", "jsonl", "json")
_ENDINGS: dict[str, Kind] = {f".{kind}": kind for kind in TABLES} | {".tsv": "csv"}
IMAGE_ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".gif"),
    *(".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl"),
)
"""What names of pictures end with; not all of these can be read, and then it is said of which."""
OF_DESKTOPS, OTHER_KINDS, HIDDEN = "files of a desktop", "files of other kinds", "hidden files"
BESIDE_TARS, UNPACK = "tables beside their tars", "compressed tars: unpack them"


def kind_of(path: Path) -> Kind | None:
    """What a file is by its ending, in capitals or not; tables of text may be gzipped besides."""
    *before, last = "", *(suffix.lower() for suffix in path.suffixes)
    if last != ".gz":
        return _ENDINGS.get(last)
    packed = _ENDINGS.get(before[-1])
    return packed if packed in ("csv", "jsonl", "json") else None


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

    def beside(self, number: int) -> Path:
        """The folder that paths of images in a file are relative to."""
        return self.paths[number] if self.kind == "folder" else self.paths[number].parent

    def signature(self) -> list[list[str | int]]:
        """Name, size and time of change of each file, and the names of others: while it stays the
        same, so do they.
        """
        paths: Iterable[Path] = self.paths
        if self.kind == "folder":
            paths = files_below(self.paths[0])
        found: list[list[str | int]] = [list(other) for other in self.passed_over]
        for path in paths:
            status = path.stat()
            name = path.relative_to(self.root).as_posix()
            found.append([name, status.st_size, status.st_mtime_ns])
        return found


def refuse_url(told: str, path: str, key: str) -> None:
    """DataError for a ``path`` that is a URL; ``told`` is what a message calls it."""
    if "://" in path:
        raise DataError(
            f"{told} is a URL, and nothing but shards is read over the network: download it and "
            "give its path",
            key,
            "unsupported",
        )


def find_files(path: str, image_folders: tuple[str, ...] | None = None) -> SourceFiles:
    """The files that ``prepare.source.path`` names: one, a folder's, or those of a pattern.

    A folder that holds all ``image_folders`` is one of images. DataError when there is nothing to
    read, or several kinds of it.
    """
    where = f"prepare.source.path={path}"
    refuse_url(where, path, "prepare.source.path")
    place = Path(path)
    if place.is_dir():
        if image_folders and all((place / name).is_dir() for name in image_folders):
            return SourceFiles("folder", place.parent, (place,))
        found = list(place.rglob("*"))
    elif place.exists():
        found, place = [place], place.parent
    else:
        found = [Path(name) for name in glob.glob(path, recursive=True)]
        if not found:
            told = f"{where}: there is no such file or folder, nor one of that pattern"
            raise DataError(told, "prepare.source.path", "missing")
        place = Path(os.path.commonpath([file.parent for file in found]))
    return _of_one_kind(where, place, sorted(found), image_folders)


def _of_one_kind(
    where: str, place: Path, found: list[Path], image_folders: tuple[str, ...] | None
) -> SourceFiles:
    kinds: dict[str, list[Path]] = {kind: [] for kind in TABLES}
    others: dict[Path, str] = {}
    ours = {file.parent for file in found if file.name == "recipe.yaml" and is_resolved(file)}
    for file in found:
        if not ours.isdisjoint(file.parents):
            continue  # tables of a run, whose folder somebody put beside the data
        hidden = _hidden_part(file, place)
        if hidden is not None:
            others[hidden] = OF_DESKTOPS if is_of_a_desktop(hidden.name) else HIDDEN
        elif file.is_file():
            kind = kind_of(file)
            if kind and not is_of_a_desktop(file.relative_to(place).as_posix()):
                kinds[kind].append(file)
            else:
                others[file] = _why(file)
    tars = {file.with_suffix("") for file in kinds["tar"]}
    if beside := [file for file in kinds["parquet"] if file.with_suffix("") in tars]:
        others |= dict.fromkeys(beside, BESIDE_TARS)  # img2dataset's
        kinds["parquet"] = [file for file in kinds["parquet"] if file not in beside]
    if sum(map(bool, kinds.values())) > 1:  # then it says something about the others
        others |= dict.fromkeys(kinds["json"], OTHER_KINDS)
        kinds["json"] = []
    present = [kind for kind in TABLES if kinds[kind]]
    if len(present) > 1:
        counts = ", ".join(f"{len(kinds[kind])} {kind}" for kind in present)
        told = f"{where}: holds {counts} files: name one kind, e.g. PATH/*.{present[0]}"
        raise DataError(told, "prepare.source.path", "ambiguous")
    if not present:
        folders = f", nor folders {' and '.join(image_folders)}" if image_folders else ""
        there = counted(others) or "nothing"
        raise DataError(
            f"{where}: holds no {', '.join(_ENDINGS)} files{folders}; there is {there}",
            "prepare.source.path",
            "unsupported" if UNPACK in others.values() else "empty",
        )
    paths = kinds[present[0]]
    root = Path(os.path.commonpath([file.parent for file in paths]))
    return SourceFiles(present[0], root, tuple(paths), _named(others, place, present[0]))


def _named(others: dict[Path, str], place: Path, kind: Kind) -> tuple[tuple[str, str], ...]:
    """Pictures beside a table are what its rows are about."""
    return tuple(
        (file.relative_to(place).as_posix(), why)
        for file, why in sorted(others.items())
        if kind == "tar" or file.suffix.lower() not in IMAGE_ENDINGS
    )


def _why(file: Path) -> str:
    if is_of_a_desktop(file.as_posix()):
        return OF_DESKTOPS
    compressed = file.suffix.lower() == ".tgz" or file.suffixes[-2:-1] == [".tar"]
    return UNPACK if compressed else OTHER_KINDS


def files_below(folder: Path) -> list[Path]:
    """The files in a folder and in those inside, in their order; a folder right in it may be a
    link, as to winners that lie elsewhere.
    """
    inner = [folder, *(path for path in folder.iterdir() if path.is_symlink() and path.is_dir())]
    return sorted(path for place in inner for path in place.rglob("*") if path.is_file())


def counted(files: Iterable[PurePath]) -> str:
    """``3 .png, 1 .txt``."""
    counts = Counter(file.suffix.lower() or file.name for file in files)
    return ", ".join(f"{count} {ending}" for ending, count in sorted(counts.items()))


def is_of_a_desktop(name: str) -> bool:
    """Whether a file or member is one that desktops leave behind, macOS above all."""
    *folders, base = name.split("/")
    return "__MACOSX" in folders or base.startswith("._") or base in (".DS_Store", "Thumbs.db")


def _hidden_part(path: Path, root: Path) -> Path | None:
    """The hidden file or folder that is ``path`` or holds it."""
    parts = path.relative_to(root).parts
    for depth, part in enumerate(parts):
        if part.startswith("."):
            return root.joinpath(*parts[: depth + 1])
    return None
