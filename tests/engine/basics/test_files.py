"""Files that exist whole or not at all."""

import hashlib
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cdpo.engine.basics import files
from cdpo.engine.basics.errors import CheckpointError, DataError, OutsideError, RecipeError
from cdpo.engine.basics.files import lfs_pointer, replacing
from refusals import refused


def test_the_new_file_takes_the_place_of_the_old_one_with_its_count_and_hash(tmp_path):
    path = tmp_path / "made" / "a.bin"
    for content in (b"old", b"a" * 70_000):
        with replacing(path) as file:
            file.write(content[:2])
            file.write(memoryview(content)[2:])
        assert path.read_bytes() == content
        assert (file.bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert [other.name for other in path.parent.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), ValueError("no"), OSError("torn")])
def test_a_block_that_raises_leaves_the_old_file_alone(tmp_path, raised):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    with pytest.raises(type(raised)), replacing(path, error=None) as file:
        file.write(b"new")
        raise raised
    assert path.read_bytes() == b"old"
    assert [other.name for other in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (DataError, DataError),
        (CheckpointError, CheckpointError),
        (RecipeError, OutsideError),  # the recipe is right
    ],
)
def test_a_full_disk_is_the_error_that_was_asked_for(tmp_path, fill_disk, error, raised):
    fill_disk()
    path = tmp_path / "a.txt"
    with refused(raised, "unwritable", str(path)), replacing(path, error) as file:
        file.write(b"new")
    assert list(tmp_path.iterdir()) == []


def test_content_and_name_reach_the_disk_before_the_block_is_left(tmp_path, monkeypatch):
    synced: list[str] = []
    monkeypatch.setattr(
        files.os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}"))
    )
    with replacing(tmp_path / "a.txt") as file:
        file.write(b"new")
        assert synced == []
    assert synced == [str(tmp_path / "a.txt.tmp"), str(tmp_path)]


def test_libraries_write_into_it(tmp_path):
    table = pa.table({"a": list(range(1000))})
    with replacing(tmp_path / "t.parquet") as file:
        pq.write_table(table, file)
    assert pq.read_table(tmp_path / "t.parquet") == table
    with replacing(tmp_path / "t.arrow") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    assert pa.ipc.open_file(tmp_path / "t.arrow").read_all() == table
    with replacing(tmp_path / "t.npy") as file:
        np.save(file, np.eye(3)[::2])
    assert np.array_equal(np.load(tmp_path / "t.npy"), np.eye(3)[::2])
    with replacing(tmp_path / "t.jsonl") as file:
        file.writelines(json.dumps(row).encode() + b"\n" for row in range(3))
    assert (tmp_path / "t.jsonl").read_text() == "0\n1\n2\n"


@pytest.mark.parametrize(
    ("head", "is_one"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", True),
        (b"version https://git-lfs", False),
        (b"", False),
    ],
)
def test_pointers_of_git_lfs(head, is_one):
    assert lfs_pointer(head) == is_one
