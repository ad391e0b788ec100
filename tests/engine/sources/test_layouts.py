"""Every layout that docs/data.md lists is read, from its own example."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import preferences
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from cdpo.engine.recipe.prepare import Prepare
from cdpo.engine.sources import open_source
from cdpo.engine.sources.index import Index, open_index
from cdpo.engine.sources.pictures import load_records

PAGE = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
EXAMPLES = dict(re.findall(r"^```layout\n# (.*)\n((?:.*\n)*?)```$", PAGE, re.M))
PICTURE = preferences.picture(1)


def content(value: Any) -> bytes:
    if value == "PICTURE":
        return PICTURE
    return (value if isinstance(value, str) else json.dumps(value)).encode()


def write(folder: Path, files: dict[str, Any]) -> None:
    tars: dict[str, list[tuple[str, bytes]]] = {}
    for name, value in files.items():
        tar, is_member, member = name.partition(".tar/")
        if is_member:
            tars.setdefault(f"{tar}.tar", []).append((member, content(value)))
            continue
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            row = {column: PICTURE if cell == "PICTURE" else cell for column, cell in value.items()}
            pq.write_table(pa.Table.from_pylist([row]), path)
        else:
            path.write_bytes(content(value))
    for tar, members in tars.items():
        (folder / tar).parent.mkdir(parents=True, exist_ok=True)
        preferences.write_plain_tar(folder / tar, members)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_read(tmp_path, name):
    files = yaml.safe_load(EXAMPLES[name])
    source = files.pop("source")
    write(tmp_path, files)
    spec = Prepare(source={**source, "path": str(tmp_path / source["path"])}).source
    reader = open_source(spec)
    index = Index(tmp_path / "index", open_index(tmp_path / "index", reader, spec, ()))
    records = list(load_records(reader, index.part(0), range(len(index)), (8, 8)))
    assert (index.facts.left_out, index.facts.noted) == ({}, {})
    assert index.facts.rows == len(index) == len(records) == (2 if "lists" in name else 1)
    for number, record in enumerate(records):
        assert index.caption(number) == "a red apple" and record.problem is None
        assert len(record.pictures) == (2 if source["type"] == "paired" else 1)


def test_every_layout_of_the_table_has_an_example():
    rows = re.search(r"\| layout \| of it \|\n\|[-|]*\n((?:\|.*\n)*)", PAGE)
    assert rows and [row.split("|")[1].strip() for row in rows[1].splitlines()] == list(EXAMPLES)
