"""A folder of pairs: PATH/winner/NAME.png, PATH/loser/NAME.png, and PATH/caption/NAME.txt or a
NAME.txt beside an image; NAME.caption will do as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import PurePosixPath

from ..basics.errors import DataError
from .files import (
    IMAGE_ENDINGS,
    OF_DESKTOPS,
    OTHER_KINDS,
    SourceFiles,
    counted,
    files_below,
    is_of_a_desktop,
)
from .left_out import LeftOut
from .rows import Images, Place, Row, UnreadableImage, decoded_caption, in_lists, load_file

TEXTS = (".txt", ".caption")  # the first wins: OneTrainer's, and kohya's
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
        names = self._names
        self._note_others({name for name, _ in names}, left_out)
        yield from in_lists(
            Row(0, number, {self.caption: self._caption(name, left_out)}, paths, where=name)
            for number, (name, paths) in enumerate(names)
        )

    def load(self, file: int, group: int, places: Sequence[Place]) -> Iterator[Images]:
        for place in places:
            yield tuple(load_file(self.folder / path) for path in place.paths)

    @cached_property
    def _inside(self) -> list[str]:
        """Every file, as it is called in here."""
        return [path.relative_to(self.folder).as_posix() for path in files_below(self.folder)]

    @cached_property
    def _names(self) -> list[tuple[str, tuple[str, ...]]]:
        """Name and image paths of every pair."""
        by_folder = [self._images_in(name) for name in self.images]
        for inside in by_folder:
            for other, beside in zip(self.images, by_folder, strict=True):
                if lone := sorted(inside.keys() - beside.keys()):
                    raise DataError(
                        f"{self.folder / other}: no image for {inside[lone[0]]}, and for "
                        f"{len(lone) - 1} others: names must match",
                        inside[lone[0]],
                        "missing",
                    )
        return [(stem, tuple(own[stem] for own in by_folder)) for stem in sorted(by_folder[0])]

    def _images_in(self, folder: str) -> dict[str, str]:
        """The images of a folder by their names without it and without their endings."""
        found: dict[str, str] = {}
        own = [name for name in self._inside if name.startswith(f"{folder}/")]
        for name in filter(_is_image, own):
            stem = _stem(name).removeprefix(f"{folder}/")
            if stem in found:
                told = f"{self.folder / name}: {found[stem]} has the same name"
                raise DataError(told, str(self.folder / name), "duplicate")
            found[stem] = name
        if not found:
            there = counted(map(PurePosixPath, own)) or "nothing"
            raise DataError(
                f"{self.folder / folder}: holds no images; there is {there}",
                str(self.folder / folder),
                "empty",
            )
        return found

    @cached_property
    def _texts(self) -> dict[str, list[str]]:
        """Files with captions by their names without the ending, in the order of the endings."""
        found: dict[str, list[str]] = defaultdict(list)
        for ending in TEXTS:
            for name in self._inside:
                if _ending(name) == ending:
                    found[_stem(name)].append(name)
        return found

    def _note_others(self, names: set[str], left_out: LeftOut) -> None:
        """Whatever lies here and is neither an image nor the caption of one."""
        own = self.files.name(0)
        for name in self._inside:
            folder, _, inside = _stem(name).partition("/")
            if is_of_a_desktop(name):
                left_out.pass_over(own, name, OF_DESKTOPS)
            elif folder not in (*self.images, self.caption) or "/" not in name:
                left_out.pass_over(own, name, OTHER_KINDS)
            elif _ending(name) in TEXTS:
                if inside not in names:
                    left_out.pass_over(own, name, LONE_TEXT)
            elif folder == self.caption or not _is_image(name):
                left_out.pass_over(own, name, OTHER_KINDS)

    def _caption(self, name: str, left_out: LeftOut) -> str:
        """Of the folder of captions, else beside the first image that has one."""
        folders = (self.caption, *self.images)
        present = [place for folder in folders for place in self._texts.get(f"{folder}/{name}", ())]
        present = present or [f"{self.caption}/{name}{TEXTS[0]}"]
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


def _ending(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()


def _is_image(name: str) -> bool:
    return _ending(name) in IMAGE_ENDINGS and not is_of_a_desktop(name)
