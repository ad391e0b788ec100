"""A folder of pairs: PATH/winner/NAME.png, PATH/loser/NAME.png and PATH/caption/NAME.txt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..basics.errors import DataError
from .files import SourceFiles
from .left_out import LeftOut
from .rows import ROWS_AT_ONCE, Images, Place, Row, UnreadableImage, load_file

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
MAX_CAPTION_BYTES = 2**16


class FolderReader:
    """One folder for each image of a pair and one of captions; files belong together by name.

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
        for start in range(0, len(names), ROWS_AT_ONCE):
            chunk = names[start : start + ROWS_AT_ONCE]
            yield [
                Row(0, start + index, {self.caption: self._caption(name)}, paths, where=name)
                for index, (name, paths) in enumerate(chunk)
            ]

    def load(self, file: int, group: int, places: Sequence[Place]) -> Iterator[Images]:
        for place in places:
            yield tuple(load_file(self.folder / path) for path in place.paths)

    def _names(self) -> list[tuple[str, tuple[str, ...]]]:
        """Stem and image paths of every pair."""
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
        """Names of the images by their stem."""
        found: dict[str, str] = {}
        for path in sorted((self.folder / folder).iterdir()):
            if path.suffix.lower() in ENDINGS:
                if path.stem in found:
                    told = f"{path}: {found[path.stem]} has the same name"
                    raise DataError(told, str(path), "duplicate")
                found[path.stem] = path.name
        return found

    def _caption(self, name: str) -> str:
        path = self.folder / self.caption / f"{name}.txt"
        data = load_file(Path(path))
        if isinstance(data, UnreadableImage):
            raise DataError(f"caption of {name}: {data}", str(path), data.kind)
        if len(data) > MAX_CAPTION_BYTES:
            return ""  # no caption: the row is left out and counted
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            told = f"{path} is not UTF-8 text (byte {error.start})"
            raise DataError(told, str(path), "unreadable") from None
