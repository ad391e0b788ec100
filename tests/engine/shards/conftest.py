"""Tars as bytes, and what is wrong with them."""

import hashlib
import io

import numpy as np
import pytest
from cdpo.engine.basics.errors import ShardError
from cdpo.engine.shards.manifest import ShardEntry
from cdpo.engine.shards.reader import ShardReaders
from refusals import refused


@pytest.fixture
def read_bytes(tmp_path, small):
    """Read all of a tar of ``count`` samples whose size and sha256 are as declared."""

    def read(data: bytes, count: int = 2):
        (tmp_path / "x.tar").write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        entry = ShardEntry(
            name="x.tar", tier=1, count=count, bytes=max(1, len(data)), sha256=sha256
        )
        other = entry.model_copy(update={"name": "y.tar"})
        readers = ShardReaders(tmp_path, small.manifest([entry, other], 2, 1))
        return [readers.read(entry, index) for index in range(count)]

    return read


@pytest.fixture
def good(small):
    """Members (name, bytes) of a sound tar of two samples: json, latents, json, latents."""
    members = []
    for number in range(2):
        meta = small.meta(1, number)
        buffer = io.BytesIO()
        np.save(buffer, small.latents(meta).astype(np.float16))
        key = f"{meta.pair_id:016x}"
        members.append((f"{key}.json", meta.model_dump_json().encode()))
        members.append((f"{key}.latents.npy", buffer.getvalue()))
    return members


@pytest.fixture
def refuse(read_bytes):
    """Check that a tar gives one line of ShardError of this kind, about this key and member."""

    def check(data: bytes, kind: str, key: str | None = None, member: str | None = None):
        with refused(ShardError, kind) as told:
            read_bytes(data)
        assert "\n" not in str(told.value)
        assert "x.tar" in told.value.shard
        assert (told.value.key, told.value.member) == (key, member)

    return check
