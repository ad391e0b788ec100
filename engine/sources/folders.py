"""A folder of pairs: PATH/winner/NAME.png, PATH/loser/NAME.png, and PATH/caption/NAME.txt or a
NAME.txt beside an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..basics.errors import DataError
from .files import (
    IMAGE_ENDINGS,
    OF_DESKTOPS,
    OTHER_KINDS,
    SourceFiles,
    counted,
    is_of_a_desktop,
)
from .left_out import LeftOut
from .rows import Images, Place, Row, UnreadableImage, decoded_caption, in_lists, load_file

TEXT = ".txt"
LONE_TEXT, TWO_TEXTS = "captions without an image", "another caption beside another image"


class FolderReader:
    """One folder for each image of a pair, with folders inside or without, and perhaps one of
    captions; files belong together by their name, which counts from that folder, but for its
    ending.

    Rows are numbered in the order of the names.
    """

    def __init__(self, files: SourceFiles, images: tuple[str, ...], caption: str) -> None:
        self.files = files
        self.images = images
        self.caption = caption
        self.folder = files.paths[0]
        self._found: list[tuple[str, tuple[str, ...]]] | None = None

    def columns(self) -> list[str]:
        """The sub-folders: a folder knows neither labels nor scores."""
        return sorted(inner.name for inner in self.folder.iterdir() if inner.is_dir())

    def rows(self, file: int, columns: Sequence[str], left_out: LeftOut) -> Iterator[list[Row]]:
        unknown = [name for name in columns if name != self.caption]
        if unknown:
            raise DataError(
                f"{self.folder}: a folder of images has no column {' and no column '.join(unknown)}"
                ": set them to null, or give a table",
                unknown[0],
                "missing",
            )
        names = self._names()
        self._note_others({name for name, _ in names}, left_out)
        yield from in_lists(
            Row(0, number, {self.caption: self._caption(name, left_out)}, paths, where=name)
            for number, (name, paths) in enumerate(names)
        )

    def load(self, file: int, group: int, places: Sequence[Place]) -> Iterator[Images]:
        for place in places:
            yield tuple(load_file(self.folder / path) for path in place.paths)

    def _names(self) -> list[tuple[str, tuple[str, ...]]]:
        """Name and image paths of every pair."""
        if self._found is None:
            by_folder = [self._images_in(name) for name in self.images]
            for name, inside in zip(self.images, by_folder, strict=True):
                for other, beside in zip(self.images, by_folder, strict=True):
                    lone = sorted(inside.keys() - beside.keys())
                    if lone:
                        raise DataError(
                            f"{self.folder / other}: no image for {name}/{inside[lone[0]]}, and "
                            f"for {len(lone) - 1} others: names must match",
                            f"{name}/{inside[lone[0]]}",
                            "missing",
                        )
            self._found = [
                (stem, tuple(f"{n}/{i[stem]}" for n, i in zip(self.images, by_folder, strict=True)))
                for stem in sorted(by_folder[0])
            ]
        return self._found

    def _images_in(self, folder: str) -> dict[str, str]:
        """Names of the images without and with their endings."""
        found: dict[str, str] = {}
        files = self._files_in(folder)
        for path in files:
            name = path.relative_to(self.folder / folder)
            if _is_image(path):
                stem = name.with_suffix("").as_posix()
                if stem in found:
                    told = f"{path}: {found[stem]} has the same name"
                    raise DataError(told, str(path), "duplicate")
                found[stem] = name.as_posix()
        if not found:
            raise DataError(
                f"{self.folder / folder}: holds no images; there is {counted(files) or 'nothing'}",
                str(self.folder / folder),
                "empty",
            )
        return found

    def _files_in(self, folder: str) -> list[Path]:
        return sorted(path for path in (self.folder / folder).rglob("*") if path.is_file())

    def _note_others(self, names: set[str], left_out: LeftOut) -> None:
        """Whatever lies here and is neither an image nor the caption of one."""
        own = self.files.name(0)
        read = (*self.images, self.caption)
        beside = [path for path in self.folder.rglob("*") if path.is_file()]
        for path in sorted(beside):
            name = path.relative_to(self.folder)
            inside = name.with_suffix("").as_posix().partition("/")[2]
            if is_of_a_desktop(name.as_posix()):
                left_out.pass_over(own, name.as_posix(), OF_DESKTOPS)
            elif name.parts[0] not in read or len(name.parts) == 1:
                left_out.pass_over(own, name.as_posix(), OTHER_KINDS)
            elif path.suffix.lower() == TEXT:
                if inside not in names:
                    left_out.pass_over(own, name.as_posix(), LONE_TEXT)
            elif name.parts[0] == self.caption or not _is_image(path):
                left_out.pass_over(own, name.as_posix(), OTHER_KINDS)

    def _caption(self, name: str, left_out: LeftOut) -> str:
        """Of the folder of captions, else beside the first image that has one."""
        places = [f"{folder}/{name}{TEXT}" for folder in (self.caption, *self.images)]
        present = [place for place in places if (self.folder / place).exists()] or places[:1]
        texts = [self._text(name, place) for place in present]
        for place, text in zip(present, texts, strict=True):
            if text != texts[0]:
                left_out.pass_over(self.files.name(0), place, TWO_TEXTS, self.caption)
        return texts[0]

    def _text(self, name: str, place: str) -> str:
        path = self.folder / place
        data = load_file(path)
        if isinstance(data, UnreadableImage):
            raise DataError(f"caption of {name}: {data}", str(path), data.kind)
        return decoded_caption(data, str(path), str(path)).strip()


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_ENDINGS and not is_of_a_desktop(path.name)
