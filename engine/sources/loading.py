"""Pictures of some records of a part, in their order, decoded ahead by a few threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from ..basics.errors import DataError
from .index import Part
from .pictures import Picture, Size, read_picture
from .rows import RowReader, UnreadableImage

MOST_THREADS = 8  # Pillow decodes outside Python's lock


@dataclass(frozen=True, slots=True)
class Loaded:
    """The pictures of a record, or why one cannot be read; ``index`` is that in its part."""

    index: int
    caption: str
    pictures: tuple[Picture, ...]
    problem: str | None = None


def load_records(
    reader: RowReader, part: Part, wanted: Sequence[int], resolution: Size
) -> Iterator[Loaded]:
    """The records ``wanted``, indices into ``part`` in rising order. At most twice as many records
    as there are threads are in memory.
    """
    threads = max(1, min(MOST_THREADS, (os.cpu_count() or 1) // 2))

    def decode(index: int, data: tuple[bytes | UnreadableImage, ...]) -> Loaded:
        try:
            named = zip(reader.images, data, strict=True)
            pictures = tuple(_picture(name, item, resolution) for name, item in named)
            return Loaded(index, part.captions[index], pictures)
        except UnreadableImage as error:
            where = reader.describe(part.file, part.places[index].number)
            return Loaded(index, part.captions[index], (), f"{where}: {error}")

    places = [part.places[index] for index in wanted]
    waiting: deque[Future[Loaded]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        found = 0
        for index, data in zip(wanted, reader.load(part.file, part.group, places), strict=False):
            found += 1
            waiting.append(pool.submit(decode, index, data))
            if len(waiting) >= 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
        if found < len(wanted):
            raise DataError(
                f"{reader.files.paths[part.file]}: has fewer rows than when it was indexed: it has "
                "changed; start again"
            )


def _picture(column: str, data: bytes | UnreadableImage, resolution: Size) -> Picture:
    if isinstance(data, UnreadableImage):
        raise UnreadableImage(f"{column}: {data}")
    try:
        return read_picture(data, resolution)
    except UnreadableImage as error:
        raise UnreadableImage(f"{column}: {error}") from None
