import json
from functools import partial

import numpy as np
import pytest
from cdpo.engine.basics.errors import ShardError
from cdpo.engine.shards.writer import write_shard
from refusals import refused


def changed(good, position, data):
    return [*good[:position], (good[position][0], data), *good[position + 1 :]]


def npy_header(text: str) -> bytes:
    header = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


DATA = np.arange(1, 33).astype("<f2").tobytes()
GOOD_HEADER = "{'descr': '<f2', 'fortran_order': False, 'shape': (2, 4, 2, 2), }"


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (
            npy_header(GOOD_HEADER.replace("2, 2)", "200000, 200000)")) + DATA,
            "mismatch",
        ),
        (npy_header(GOOD_HEADER.replace("(2, 4, 2, 2)", "(2, 4, 4, 1)")) + DATA, "mismatch"),
        (npy_header(GOOD_HEADER.replace("<f2", "<f4")) + DATA * 2, "wrong-type"),
        (npy_header(GOOD_HEADER.replace("<f2", "|O")) + DATA, "wrong-type"),
        (npy_header(GOOD_HEADER.replace("False", "True")) + DATA, "wrong-type"),
        (npy_header("__import__('os').abort()") + DATA, "damaged"),
        (npy_header(GOOD_HEADER) + DATA[:-2], "mismatch"),
        (npy_header(GOOD_HEADER) + DATA + b"\0\0", "mismatch"),
        (npy_header(GOOD_HEADER).replace(b"\x01\x00", b"\x02\x00", 1) + DATA, "unsupported"),
        (b"\x80\x04K\x01.", "unsupported"),
        (b"", "unsupported"),
        (npy_header(GOOD_HEADER) + DATA[:-2] + b"\x00\x7c", "non-finite"),
        (npy_header(GOOD_HEADER) + b"\x01\xfe" + DATA[2:], "non-finite"),
    ],
)
def test_latents_that_lie(refuse, good, small, data, kind):
    key = good[3][0].split(".")[0]
    refuse(small.tar(changed(good, 3, data)), kind, key, "latents.npy")


def sides(winner: object, loser: object) -> bytes:
    halves = [np.resize(np.asarray(side, "<f2"), 16) for side in (winner, loser)]
    return npy_header(GOOD_HEADER) + np.concatenate(halves).tobytes()


def test_latents_as_far_as_any_vae_gives_them_are_read(read_bytes, good, small):
    data = sides(-1000, [1000, 0])
    assert read_bytes(small.tar(changed(good, 3, data)))[1].images.min() == -1000


@pytest.mark.parametrize(
    ("winner", "loser", "kind"),
    [
        ([1, 2, 3], [1, 2, 3], "no-preference"),
        ([0, 1], [-0.0, 1], "no-preference"),
        ([1, 2, 3], 0, "out-of-range"),
        ([1, 2, 3], [0, -0.0], "out-of-range"),
        (0, [1, 2, 3], "out-of-range"),
        ([0.5, 1001], 1, "out-of-range"),
        (1, [0.5, -1001], "out-of-range"),
        (1, -65504, "out-of-range"),
    ],
)
def test_latents_of_no_two_images(refuse, good, small, winner, loser, kind):
    key = good[3][0].split(".")[0]
    refuse(small.tar(changed(good, 3, sides(winner, loser))), kind, key, "latents.npy")


def test_members_too_large_for_what_they_are(refuse, good, small):
    """Found in the headers, before a byte of the member is read."""
    key = good[3][0].split(".")[0]
    refuse(small.tar(changed(good, 3, bytes(100_000))), "too-large", key, "latents.npy")
    refuse(small.tar(changed(good, 2, b" " * 70_000)), "too-large", key, "json")


NO_PREFERENCE = [
    {"images": ("a", "a")},
    {"ranks": (2, 1)},
    {"ranks": (1, 1)},
    {"scores": (0.5, 0.5)},
    {"scores": (0.25, 0.75), "ranks": (2, 5)},
]


@pytest.mark.parametrize("change", NO_PREFERENCE)
def test_what_is_no_preference_is_not_written(small, tmp_path, change):
    meta = small.meta(1, 0).model_copy(update=change)
    with refused(ShardError, "no-preference") as told:
        write_shard(tmp_path / "x.tar", [(meta, small.latents(meta))], small.CONTENTS)
    assert (told.value.key, told.value.member) == (f"{meta.pair_id:016x}", "json")
    assert not [*tmp_path.iterdir()]


def test_a_label_kept_against_the_scores_is_a_preference(small, tmp_path):
    meta = small.meta(1, 0).model_copy(update={"scores": (0.25, 0.75)})
    assert write_shard(tmp_path / "x.tar", [(meta, small.latents(meta))], small.CONTENTS)


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        (lambda m: m.pop("prompt"), "damaged"),
        (lambda m: m.update(more=1), "damaged"),
        (lambda m: m.update(tier="1"), "damaged"),
        (lambda m: m.update(tier=2), "mismatch"),
        (lambda m: m.update(pair_id=5), "mismatch"),
        (lambda m: m.update(pair_id=2**63), "damaged"),
        (lambda m: m.update(scores=[1, float("nan")]), "damaged"),
        *((partial(dict.update, **change), "no-preference") for change in NO_PREFERENCE),
        (lambda m: m.update(prompt="x" * 20_000), "damaged"),
        (lambda m: m.update(crop=[[0, 0]]), "damaged"),
        *((data, "damaged") for data in (b"", b"{", b"[]", b"\xff\xfe", b"[" * 60_000)),
    ],
)
def test_records_that_lie(refuse, good, small, record, kind):
    if not isinstance(record, bytes):
        edit, fields = record, json.loads(good[2][1])
        edit(fields)
        record = json.dumps(fields).encode()
    key = good[3][0].split(".")[0]
    refuse(small.tar(changed(good, 2, record)), kind, key, "json")
