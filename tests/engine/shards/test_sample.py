import json

import numpy as np
import pytest
from cdpo.engine.basics.errors import ShardError


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
def test_latents_that_lie(refused, good, small, data, reason):
    key = good[3][0].split(".")[0]
    tar = small.tar(changed(good, 3, data))
    refused(tar, reason=reason, key=key, member="latents.npy")


def test_the_largest_float16_is_finite(read_bytes, good, small):
    data = npy_header(GOOD_HEADER) + np.full(32, -65504, dtype="<f2").tobytes()
    assert read_bytes(small.tar(changed(good, 3, data)))[1].images.min() == -65504


def test_members_too_large_for_what_they_are(refused, good, small):
    """Found in the headers, before a byte of the member is read."""
    key = good[3][0].split(".")[0]
    huge = small.tar(changed(good, 3, bytes(100_000)))
    refused(huge, reason="at most 1088 expected", key=key, member="latents.npy")
    long = small.tar(changed(good, 2, b" " * 70_000))
    refused(long, reason="at most 65536 expected", key=key, member="json")


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
def test_records_that_lie(refused, good, small, edit, reason):
    record = json.loads(good[2][1])
    edit(record)
    key = good[3][0].split(".")[0]
    tar = small.tar(changed(good, 2, json.dumps(record).encode()))
    refused(tar, reason=reason, key=key, member="json")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 60_000])
def test_records_that_are_not_json_objects(read_bytes, good, small, data):
    key = good[3][0].split(".")[0]
    with pytest.raises(ShardError) as error:
        read_bytes(small.tar(changed(good, 2, data)))
    assert (error.value.key, error.value.member) == (key, "json")
