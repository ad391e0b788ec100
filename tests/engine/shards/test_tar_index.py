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


@pytest.mark.parametrize("length", [300, 600, 512 * 8 + 512])
def test_truncations_are_told_from_damage(refuse, good, small, length):
    refuse(small.tar(good)[:length], "truncated")


def test_members_missing_doubled_unexpected_or_interleaved(refuse, good, small):
    (json_a, npy_a), (json_b, npy_b) = (good[:2], good[2:])
    key_a, key_b = (name[0].split(".")[0] for name in (json_a, json_b))
    tar = small.tar
    cases = [
        ([json_a, json_b, npy_b], "missing", key_a, "latents.npy"),
        ([json_a, npy_a, npy_b], "missing", key_b, "json"),
        ([json_a, npy_a, npy_a, json_b, npy_b], "duplicate", key_a, "latents.npy"),
        ([json_a, npy_a, json_a, npy_a], "duplicate", key_a, "json"),
        ([json_a, json_b, npy_a, npy_b], "missing", key_a, "latents.npy"),
        ([json_a, npy_a, json_b, npy_b, json_a, npy_a], "duplicate", key_a, "json"),
        ([*good, (f"{key_b}.txt", b"x")], "unknown", key_b, "txt"),
        ([*good, (f"{key_b}.pkl", b"x")], "unknown", key_b, "pkl"),
        ([*good, ("zz.json", b"{}")], "mismatch", "zz", "json"),
    ]
    for members, kind, key, member in cases:
        refuse(tar(members), kind, key, member)
    refuse(tar(good[:2]), "mismatch")
    refuse(tar([]), "mismatch")


@pytest.mark.parametrize(
    ("name", "kind", "key"),
    [
        ("img.v1.0.latents.npy", "unknown", "img"),
        ("../a.json", "unsupported", None),
        ("/etc/passwd.json", "unsupported", None),
        ("folder/a.json", "unsupported", None),
        ("key with space.json", "unsupported", None),
        ("json", "unsupported", None),
        ("a\n.json", "unsupported", None),
        ("ü.json", "unsupported", None),
    ],
)
def test_names_outside_the_rule(refuse, good, small, name, kind, key):
    refuse(small.tar([*good, (name, b"{}")]), kind, key, key and name.removeprefix(f"{key}."))


@pytest.mark.parametrize(
    "kind",
    [
        *(tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE),
        *(tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE),
    ],
)
def test_only_regular_files(refuse, good, small, kind):
    refuse(small.tar(good, type=kind, linkname="/etc/passwd"), "unsupported")


def test_other_formats(refuse, good, small):
    tar = small.tar(good)
    refuse(gzip.compress(tar), "unsupported")
    refuse(b"x" * 2048, "unsupported")
    damaged = bytearray(tar)
    damaged[3] ^= 1
    refuse(bytes(damaged), "damaged")
    refuse(tar.rstrip(b"\0") + bytes(2048) + tar, "damaged")


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
