"""The records of a source, without their images, on disk: what every phase of an import asks.

`index.arrow` is an Arrow file that is mapped, not read, so that a million captions cost no memory;
its record batches are the *parts* in which images are scored and encoded. `index.json`, written
last, says what it was made of; `left_out.csv` names what became no record. The parts are a function
of the source alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..basics.errors import DataError
from ..basics.files import replacing
from ..basics.keyed import content_id
from ..basics.prompt_identity import identity_of
from ..recipe import Imported
from .files import SourceFiles
from .left_out import NAME, LeftOut, naming
from .records import Record, RecordMaker
from .rows import Place, RowReader, describe

VERSION = 2  # of the layout below: another one is made again
SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("file", pa.int32()),
        ("group", pa.int32()),
        ("number", pa.int64()),
        ("caption", pa.string()),
        ("caption_id", pa.int64()),
        ("winner", pa.int8()),
        ("names", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
        ("paths", pa.list_(pa.string())),
        ("spans", pa.list_(pa.int64())),
        ("where", pa.string()),
    ]
)


@dataclass(frozen=True)
class IndexFacts:
    """What an index was made of, and what became of the rows."""

    made_of: str
    """Hash of the files' names, sizes and times and of what the recipe asks for."""
    content: str
    """Hash of the records: the same for a copy of the source, wherever it lies."""
    rows: int
    left_out: dict[str, int]
    """Rows that state no preference, by reason."""
    noted: dict[str, int]
    """What else was noted of the source, by reason: see :mod:`.left_out`."""


@dataclass(frozen=True)
class Part:
    """Neighbouring records of one group of one file; record ``i`` of it is ``first + i`` of all."""

    file: int
    group: int
    first: int
    captions: list[str]
    places: list[Place]


class Index:
    """The open index of a source. Records are numbered from 0 in the order of the source."""

    def __init__(self, folder: Path, facts: IndexFacts) -> None:
        self.facts = facts
        self._file = pa.ipc.open_file(pa.memory_map(str(folder / "index.arrow")))
        self.batch = lru_cache(maxsize=64)(self._file.get_batch)
        sizes = [self._file.get_batch(p).num_rows for p in range(self.num_parts)]
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def num_parts(self) -> int:
        return int(self._file.num_record_batches)

    def part(self, number: int) -> Part:
        """Where the images of a part's records are, and their captions."""
        batch = self._file.get_batch(number)
        columns = (batch.column(name).to_pylist() for name in ("number", "paths", "spans", "where"))
        return Part(
            batch.column("file")[0].as_py(),
            batch.column("group")[0].as_py(),
            int(self.starts[number]),
            batch.column("caption").to_pylist(),
            [
                Place(row, tuple(paths), tuple(spans), where)
                for row, paths, spans, where in zip(*columns, strict=True)
            ],
        )

    def part_of(self, record: int) -> int:
        """The part a record is in."""
        return int(np.searchsorted(self.starts, record, side="right")) - 1

    def value(self, record: int, column: str) -> Any:
        """One value of a record."""
        part = self.part_of(record)
        return self.batch(part).column(column)[record - int(self.starts[part])].as_py()

    def caption(self, record: int) -> str:
        """The caption of a record."""
        return str(self.value(record, "caption"))

    def numbers(self, column: str) -> np.ndarray:
        """A column of all records: (N,), or (N, K) of one with K values each, as ``scores``."""
        columns = [self._file.get_batch(p).column(column) for p in range(self.num_parts)]
        if pa.types.is_list(SCHEMA.field(column).type):
            values = [np.asarray(part.flatten()).reshape(len(part), -1) for part in columns]
        else:
            values = [np.asarray(part) for part in columns]
        return np.concatenate(values)

    def prompt_ids(self) -> np.ndarray:
        """(N,) int64, the same where captions are one prompt: the id of its first spelling."""
        found, first = np.empty(len(self), np.int64), dict[int, int]()
        for number in range(self.num_parts):
            batch = self._file.get_batch(number)
            own = zip(batch.column("caption"), batch.column("caption_id"), strict=True)
            for record, (caption, spelling) in enumerate(own, start=int(self.starts[number])):
                prompt = content_id(identity_of(caption.as_py()))  # millions of texts: not kept
                found[record] = first.setdefault(prompt, spelling.as_py())
        return found


def open_index(
    folder: Path, reader: RowReader, spec: Imported, heldout: Collection[str]
) -> IndexFacts:
    """Make the index in ``folder`` unless it is there for these very files; returns its facts.

    Reads every row of the source but no image; memory does not grow with it. Raises DataError for
    a source without records, and for what :class:`RecordMaker` refuses.
    """
    made_of = _hash([VERSION, reader.files.signature(), _asked(spec), sorted(heldout)])
    facts = load_facts(folder)
    if facts is None or facts.made_of != made_of:
        folder.mkdir(parents=True, exist_ok=True)
        facts = _make(folder, reader, spec, heldout, made_of)
    if not facts.rows or facts.rows == sum(facts.left_out.values()):
        counts = facts.left_out | facts.noted
        listed = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        raise DataError(
            f"prepare.source.path={spec.path}: none of its {facts.rows} rows states a preference"
            + (f": {listed} (each is named in {folder / NAME})" if counts else ""),
            "prepare.source.path",
            "empty",
        )
    return facts


def images_seen(index: Index, files: SourceFiles) -> str:
    """Hash of what is known of images without reading them: the sizes of the files they lie in,
    and of images that are files size and time of change.
    """
    sizes = [path.stat().st_size for path in files.paths if path.is_file()]
    seen = hashlib.sha256(json.dumps(sizes).encode())
    for number in range(index.num_parts):
        batch = index.batch(number)
        folder, states = files.beside(batch.column("file")[0].as_py()), []
        for path in batch.column("paths").flatten().to_pylist():
            try:
                state = os.stat(os.path.join(folder, path)) if path else None
            except (OSError, ValueError):  # a name with a zero byte is a ValueError
                state = None
            states.append((state.st_size, state.st_mtime_ns) if state else None)
        seen.update(json.dumps(states).encode())
    return seen.hexdigest()


def load_facts(folder: Path) -> IndexFacts | None:
    """The facts of the index in ``folder``; None if there is none that can be used."""
    if not (folder / NAME).exists():
        return None
    try:
        return IndexFacts(**json.loads((folder / "index.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _make(
    folder: Path, reader: RowReader, spec: Imported, heldout: Collection[str], made_of: str
) -> IndexFacts:
    maker = RecordMaker(spec, reader.columns(), heldout)
    content = hashlib.sha256(_hash([list(reader.images), _asked(spec)]).encode())
    rows = 0
    (folder / "index.json").unlink(missing_ok=True)
    with (
        naming(folder / NAME) as left_out,
        replacing(folder / "index.arrow") as new,
        pa.ipc.new_file(new, SCHEMA) as file,
    ):
        for name, reason in reader.files.passed_over:
            left_out.pass_over(name, "", reason)
        for number, found in _limited(reader, maker, spec.limit, left_out):
            name, records = reader.files.name(number), []
            for row in found:
                where = describe(reader.files, number, row.where)
                record = maker.make(row, where, name, left_out)
                records += [record] if record else []
            if records:
                rows += len(records)
                table = [_columns(record, number, name) for record in records]
                content.update(json.dumps([name, table]).encode())
                for columns, record in zip(table, records, strict=True):
                    columns["where"] = record.row.where  # for people: another content it is not
                file.write_batch(pa.RecordBatch.from_pylist(table, SCHEMA))
    lost, rows = dict(sorted(left_out.rows.items())), rows + left_out.rows.total()
    noted = dict(sorted((left_out.beside + left_out.remarks).items()))
    facts = IndexFacts(made_of, content.hexdigest(), rows, lost, noted)
    with replacing(folder / "index.json") as text:
        text.write(json.dumps(asdict(facts), indent=1).encode())
    return facts


def _limited(
    reader: RowReader, maker: RecordMaker, limit: int | None, left_out: LeftOut
) -> Iterator[tuple[int, list[Any]]]:
    left = limit
    for number in range(len(reader.files.paths)):
        for found in reader.rows(number, maker.columns, left_out):
            yield number, found[:left]
            left = None if left is None else left - len(found)
            if left is not None and left <= 0:
                return


def _columns(record: Record, file: int, name: str) -> dict[str, Any]:
    row = record.row
    return {
        "id": content_id(name, str(row.number)),
        "file": file,
        "group": row.group,
        "number": row.number,
        "caption": record.caption,
        "caption_id": content_id(record.caption),
        "winner": record.winner,
        "names": record.names,
        "scores": record.scores,
        "paths": row.paths,
        "spans": row.spans,
    }


def _asked(spec: Imported) -> dict[str, Any]:
    """What of the recipe decides the records."""
    return spec.model_dump(mode="json", exclude={"path", "max_unreadable", "on_disagreement"})


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
