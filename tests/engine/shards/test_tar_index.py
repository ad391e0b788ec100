import gzip
import tarfile

import pytest
from cdpo.engine.basics.errors import ShardError
from cdpo.engine.shards import tar_index
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@given(st.one_of(st.binary(min_size=512, max_size=512), st.just(b"\xff" * 512)))
def test_headers_are_added_up_right(header):
    assert tar_index._sum(header) == sum(header)


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


def test_truncations_say_where(refused, good, small):
    whole = small.tar(good)
    refused(whole[:300], reason="truncated at byte 300: no end-of-archive")
    refused(whole[:600], reason="declares")
    refused(whole[: 512 * 8 + 512], reason="truncated at byte 4608: half of the end")


def test_members_missing_doubled_unexpected_or_interleaved(refused, good, small):
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
        refused(tar(members), reason=reason, key=key, member=member)
    refused(tar(good[:2]), reason="holds 1 samples, expected 2")
    refused(tar([]), reason="holds 0 samples, expected 2")


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


def test_other_formats(refused, good, small):
    tar = small.tar(good)
    refused(gzip.compress(tar), reason="gzip")
    refused(b"x" * 2048, reason="no plain USTAR header at byte 0")
    damaged = bytearray(tar)
    damaged[3] ^= 1
    refused(bytes(damaged), reason="header at byte 0 does not match its checksum")
    refused(tar.rstrip(b"\0") + bytes(2048) + tar, reason="data after its end")


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
