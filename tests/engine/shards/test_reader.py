import gzip
import hashlib
import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cdpo.engine.errors import EXIT_DATA, DataError
from cdpo.engine.shards.manifest import ShardEntry
from cdpo.engine.shards.reader import ShardReaders
from cdpo.engine.shards.shard_error import ShardError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.fixture
def shard(small, tmp_path):
    """Two lanes of one shard with four pairs; readers of the folder and its first entry."""
    manifest = small.write_set(tmp_path / "set", 2, [8], 100)
    return manifest, tmp_path / "set", manifest.shards[0]


@pytest.fixture
def read_bytes(small, tmp_path):
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


def refused(read, *args, reason: str, key: str | None = None, member: str | None = None) -> None:
    with pytest.raises(ShardError) as error:
        read(*args)
    assert "\n" not in str(error.value)
    assert "x.tar" in error.value.shard
    assert reason in error.value.reason
    assert (error.value.key, error.value.member) == (key, member)


def test_samples_come_back_as_written(shard, small):
    manifest, folder, _ = shard
    readers = ShardReaders(folder, manifest)
    seen = set()
    for entry in manifest.shards:
        for index in range(entry.count):
            sample = readers.read(entry, index)
            assert sample.latents.dtype == np.float16
            assert np.array_equal(sample.latents, small.latents(sample.meta).astype(np.float16))
            assert sample.prompt.startswith("prompt ")
            assert sample.tier == 1
            seen.add(sample.pair_id)
        assert readers.keys(entry) == [
            f"{readers.read(entry, i).pair_id:016x}" for i in range(entry.count)
        ]
    assert len(seen) == 8


def test_a_sound_tar_by_another_writer_is_read(read_bytes, good, small):
    assert [sample.pair_id for sample in read_bytes(small.tar(good))] == [
        small.meta(1, number).pair_id for number in range(2)
    ]
    swapped = [good[1], good[0], good[3], good[2]]
    assert len(read_bytes(small.tar(swapped))) == 2


def test_few_open_files_and_indexes_are_enough(small, tmp_path):
    manifest = small.write_set(tmp_path, 2, [40], 4)
    readers = ShardReaders(tmp_path, manifest, max_files=1, max_indexes=2)
    unbounded = ShardReaders(tmp_path, manifest)
    for index in range(4):
        for entry in manifest.shards:
            assert readers.read(entry, index).pair_id == unbounded.read(entry, index).pair_id
    assert len(readers._files) == 1
    assert len(readers._indexes) == 2
    readers.close()


def test_threads_share_the_readers(small, tmp_path):
    manifest = small.write_set(tmp_path, 2, [40], 4)
    readers = ShardReaders(tmp_path, manifest, max_files=2, max_indexes=3)
    places = [(entry, i) for entry in manifest.shards for i in range(entry.count)] * 5
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda place: readers.read(*place), places))
    for sample in found:
        assert np.array_equal(sample.latents, small.latents(sample.meta).astype(np.float16))
    assert len({sample.pair_id for sample in found}) == 40


def test_a_missing_shard(shard):
    manifest, folder, entry = shard
    (folder / entry.name).unlink()
    for call in (lambda r: r.read(entry, 0), lambda r: r.check_present(manifest.shards)):
        with pytest.raises(DataError, match=rf"{entry.name}: missing") as error:
            call(ShardReaders(folder, manifest))
        assert error.value.exit_code == EXIT_DATA


@pytest.mark.parametrize("change", [-1, 512])
def test_a_wrong_size_is_found_before_anything_is_read(shard, change):
    manifest, folder, entry = shard
    data = (folder / entry.name).read_bytes()
    (folder / entry.name).write_bytes((data + bytes(512))[: len(data) + change])
    for call in (lambda r: r.read(entry, 0), lambda r: r.check_present(manifest.shards)):
        with pytest.raises(ShardError, match="truncated" if change < 0 else "too long"):
            call(ShardReaders(folder, manifest))


def test_a_flipped_bit(shard):
    manifest, folder, entry = shard
    data = bytearray((folder / entry.name).read_bytes())
    data[3000] ^= 1
    (folder / entry.name).write_bytes(data)
    ShardReaders(folder, manifest).check_present(manifest.shards)
    with pytest.raises(ShardError, match="sha256"):
        ShardReaders(folder, manifest).read(entry, 0)


def test_a_shard_changed_during_the_run_is_verified_again(shard):
    manifest, folder, entry = shard
    readers = ShardReaders(folder, manifest, max_files=1)
    readers.read(entry, 0)
    data = bytearray((folder / entry.name).read_bytes())
    data[3000] ^= 1
    (folder / entry.name).unlink()
    (folder / entry.name).write_bytes(data)
    readers.read(manifest.shards[1], 0)  # closes the first
    with pytest.raises(ShardError, match="sha256"):
        readers.read(entry, 0)


def test_a_disk_that_fails_is_a_shard_error(shard):
    """A folder opens like a file and fails at the first read, as a bad disk does."""
    manifest, folder, entry = shard
    (folder / entry.name).unlink()
    (folder / entry.name).mkdir()
    size = (folder / entry.name).stat().st_size
    with pytest.raises(ShardError, match="cannot be read: Is a directory"):
        ShardReaders(folder, manifest).read(entry.model_copy(update={"bytes": size}), 0)


def test_every_truncation_is_an_error(read_bytes, good, small):
    """At every block boundary and inside every block, up to the end-of-archive blocks."""
    whole = small.tar(good)
    end = whole.rstrip(b"\0")
    content = -(-len(end) // 512) * 512 + 1024
    assert len(read_bytes(whole[:content])) == 2
    cuts = {n for edge in range(0, content, 512) for n in (edge, edge + 1, edge + 300)}
    for cut in sorted(cuts - {0}):
        with pytest.raises(ShardError):
            read_bytes(whole[: min(cut, content - 1)])


def test_truncations_say_where(read_bytes, good, small):
    whole = small.tar(good)
    refused(read_bytes, whole[:300], reason="truncated at byte 300: no end-of-archive")
    refused(read_bytes, whole[:600], reason="declares")
    refused(read_bytes, whole[: 512 * 8 + 512], reason="truncated at byte 4608: half of the end")


def test_members_missing_doubled_unexpected_or_interleaved(read_bytes, good, small):
    (json_a, npy_a), (json_b, npy_b) = (good[:2], good[2:])
    key_a, key_b = (name[0].split(".")[0] for name in (json_a, json_b))
    tar = small.tar
    cases = [
        ([json_a, json_b, npy_b], "missing", key_a, "latents.npy"),
        ([json_a, npy_a, npy_b], "missing", key_b, "json"),
        ([json_a, npy_a, npy_a, json_b, npy_b], "member comes up twice", key_a, "latents.npy"),
        ([json_a, npy_a, json_a, npy_a], "member comes up twice", key_a, "json"),
        ([json_a, json_b, npy_a, npy_b], "missing", key_a, "latents.npy"),
        (
            [json_a, npy_a, json_b, npy_b, json_a, npy_a],
            "key comes up again after another key",
            key_a,
            "json",
        ),
        ([*good, (f"{key_b}.txt", b"x")], "unexpected member", key_b, "txt"),
        ([*good, (f"{key_b}.pkl", b"x")], "unexpected member", key_b, "pkl"),
        ([*good, ("zz.json", b"{}")], "more than the declared 2", "zz", "json"),
    ]
    for members, reason, key, member in cases:
        refused(read_bytes, tar(members), reason=reason, key=key, member=member)
    refused(read_bytes, tar(good[:2]), reason="holds 1 samples, expected 2")
    refused(read_bytes, tar([]), reason="holds 0 samples, expected 2")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("img.v1.0.latents.npy", "unexpected member"),
        ("../a.json", "member name"),
        ("/etc/passwd.json", "member name"),
        ("folder/a.json", "member name"),
        ("key with space.json", "member name"),
        ("json", "member name"),
        ("a\n.json", "member name"),
        ("ü.json", "member name"),
    ],
)
def test_names_outside_the_rule(read_bytes, good, small, name, reason):
    with pytest.raises(ShardError, match=reason) as error:
        read_bytes(small.tar([*good, (name, b"{}")]), 3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.DIRTYPE, "folder"),
        (tarfile.FIFOTYPE, "pipe"),
        (tarfile.CHRTYPE, "device"),
        (tarfile.XHDTYPE, "pax header"),
        (tarfile.GNUTYPE_LONGNAME, "GNU long name"),
        (tarfile.GNUTYPE_SPARSE, "of type"),
    ],
)
def test_only_regular_files(read_bytes, good, small, kind, word):
    with pytest.raises(ShardError, match=word):
        read_bytes(small.tar(good, type=kind, linkname="/etc/passwd"))


def test_other_formats(read_bytes, good, small):
    tar = small.tar(good)
    refused(read_bytes, gzip.compress(tar), reason="gzip")
    refused(read_bytes, b"x" * 2048, reason="no plain USTAR header at byte 0")
    damaged = bytearray(tar)
    damaged[3] ^= 1
    refused(read_bytes, bytes(damaged), reason="header at byte 0 does not match its checksum")
    refused(read_bytes, tar.rstrip(b"\0") + bytes(2048) + tar, reason="data after its end")


def changed(good, position, data):
    return [*good[:position], (good[position][0], data), *good[position + 1 :]]


def npy_header(text: str) -> bytes:
    header = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


DATA = np.zeros(32, dtype="<f2").tobytes()
GOOD_HEADER = "{'descr': '<f2', 'fortran_order': False, 'shape': (2, 4, 2, 2), }"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npy_header(GOOD_HEADER.replace("(2, 4, 2, 2)", "(2, 4, 200000, 200000)")) + DATA, "shape"),
        (npy_header(GOOD_HEADER.replace("(2, 4, 2, 2)", "(2, 4, 4, 1)")) + DATA, "shape"),
        (npy_header(GOOD_HEADER.replace("<f2", "<f4")) + DATA * 2, "<f4"),
        (npy_header(GOOD_HEADER.replace("<f2", "|O")) + DATA, "|O"),
        (npy_header(GOOD_HEADER.replace("False", "True")) + DATA, "Fortran"),
        (npy_header("__import__('os').abort()") + DATA, "header that numpy would not write"),
        (npy_header(GOOD_HEADER) + DATA[:-2], "62 bytes of data, expected 64"),
        (npy_header(GOOD_HEADER) + DATA + b"\0\0", "66 bytes of data, expected 64"),
        (npy_header(GOOD_HEADER).replace(b"\x01\x00", b"\x02\x00", 1) + DATA, "version 1.0"),
        (b"\x80\x04K\x01.", "version 1.0"),
        (b"", "version 1.0"),
        (npy_header(GOOD_HEADER) + DATA[:-2] + b"\x00\x7c", "NaN or infinity"),
        (npy_header(GOOD_HEADER) + b"\x01\xfe" + DATA[2:], "NaN or infinity"),
    ],
)
def test_latents_that_lie(read_bytes, good, small, data, reason):
    key = good[3][0].split(".")[0]
    tar = small.tar(changed(good, 3, data))
    refused(read_bytes, tar, reason=reason, key=key, member="latents.npy")


def test_the_largest_float16_is_finite(read_bytes, good, small):
    data = npy_header(GOOD_HEADER) + np.full(32, -65504, dtype="<f2").tobytes()
    assert read_bytes(small.tar(changed(good, 3, data)))[1].latents.min() == -65504


def test_members_too_large_for_what_they_are(read_bytes, good, small):
    """Found in the headers, before a byte of the member is read."""
    key = good[3][0].split(".")[0]
    huge = small.tar(changed(good, 3, bytes(100_000)))
    refused(read_bytes, huge, reason="at most 1088 expected", key=key, member="latents.npy")
    long = small.tar(changed(good, 2, b" " * 70_000))
    refused(read_bytes, long, reason="at most 65536 expected", key=key, member="json")


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda m: m.pop("prompt"), "prompt: Field required"),
        (lambda m: m.update(more=1), "more: Extra inputs"),
        (lambda m: m.update(tier="1"), "tier: Input should be a valid integer"),
        (lambda m: m.update(tier=2), "is of tier 2, the manifest puts this shard in tier 1"),
        (lambda m: m.update(pair_id=5), "pair_id 5 is not that of its key"),
        (lambda m: m.update(pair_id=2**63), "pair_id: "),
        (lambda m: m.update(scores=[1, float("nan")]), "scores.1: "),
        (lambda m: m.update(prompt="x" * 20_000), "prompt: "),
        (lambda m: m.update(crop=[[0, 0]]), "crop.1: "),
    ],
)
def test_records_that_lie(read_bytes, good, small, edit, reason):
    record = json.loads(good[2][1])
    edit(record)
    key = good[3][0].split(".")[0]
    tar = small.tar(changed(good, 2, json.dumps(record).encode()))
    refused(read_bytes, tar, reason=reason, key=key, member="json")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 60_000])
def test_records_that_are_not_json_objects(read_bytes, good, small, data):
    key = good[3][0].split(".")[0]
    with pytest.raises(ShardError) as error:
        read_bytes(small.tar(changed(good, 2, data)))
    assert (error.value.key, error.value.member) == (key, "json")


@settings(
    deadline=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_damage_anywhere_is_a_shard_error_or_harmless(read_bytes, good, small, data):
    """Random bytes over a sound tar, with the checksum made to fit: nothing but ShardError."""
    tar = bytearray(small.tar(good))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 4096))
        patch = data.draw(st.binary(min_size=1, max_size=16))
        tar[at : at + len(patch)] = patch
    try:
        read_bytes(bytes(tar[: data.draw(st.sampled_from([len(tar), 4608, 2000]))]))
    except ShardError as error:
        assert "\n" not in str(error)
