"""`cdpo shards check`: a sound set passes, and every damage is listed with its shard and key."""

import re

import pytest
from cdpo.engine.preparing.shard_tools import check
from cdpo.engine.preparing.shard_tools.check import check_set
from cdpo.engine.preparing.shard_tools.command import main
from cdpo.engine.shards.manifest import load_manifest, save_manifest
from cdpo.engine.shards.tar_index import index_samples


@pytest.fixture
def folder(small, tmp_path):
    """Two tiers in two lanes: four shards of three pairs, four of two."""
    small.write_set(tmp_path / "set", 2, [12, 8], 3)
    return tmp_path / "set"


def flip(path, at: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(bytes(content))


def place(path, row: int, member: str) -> tuple[str, int]:
    """Key and offset of a member of sample ``row``."""
    with path.open("rb") as file:
        index = index_samples(file.fileno(), path.name, ("json", "latents.npy"))
    return index.keys[row].decode(), int(index.offsets[row, index.members.index(member)])


def ran(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_a_sound_set(folder, capsys):
    code, out, err = ran(capsys, "check", folder)
    manifest = load_manifest(folder)
    shards = len(manifest.shards)
    assert (code, err) == (0, "")
    assert f"sound: {manifest.num_pairs} pairs in {shards} shards, 2 tiers, 2 lanes" in out


def test_everything_that_is_wrong_is_listed(folder, capsys):
    """NaN in one sample, damaged headers in another shard, a truncated and a missing one."""
    nan, header, cut, gone, *_ = sorted(folder.glob("*.tar"))
    key, at = place(nan, 1, "latents.npy")
    flip(nan, at + 128, b"\x00\x7e")
    flip(header, 3, b"?")
    cut.write_bytes(cut.read_bytes()[:-2000])
    gone.unlink()
    code, _, err = ran(capsys, "check", folder)
    assert code == 3
    lines = [line.removeprefix("error: ") for line in err.splitlines()]
    assert re.fullmatch(rf"shard {nan}: sha256 .* is not the manifest's .*", lines[0])
    of_nan = (
        f"shard {nan}, key {key}, member latents.npy: latents of the winner hold NaN or infinity"
    )
    assert lines[1] == of_nan
    assert lines[2].startswith(f"shard {header}: sha256 ")
    assert lines[3] == f"shard {header}: header at byte 0 does not match its checksum"
    assert lines[4].startswith(f"shard {cut}: truncated: ")
    assert lines[-2].startswith(f"shard {gone}: missing")
    assert lines[-1] == "6 problems; 13 of 20 pairs in 8 shards can be read"


def test_damage_that_the_manifest_has_signed_is_found(folder, capsys):
    """Checksums tell what changed since; what was wrong from the start is found by reading."""
    path = folder / "tier-2-000001.tar"
    key, at = place(path, 0, "json")
    flip(path, at, b"[")
    manifest = load_manifest(folder)
    entries = [check._as_found(folder, entry) or entry for entry in manifest.shards]
    save_manifest(folder, manifest.model_copy(update={"shards": tuple(entries)}))
    code, _, err = ran(capsys, "check", folder)
    assert code == 3
    assert f"shard {path}, key {key}, member json: " in err
    assert "sha256" not in err
    assert "1 problems; 19 of 20 pairs" in err


def test_a_pair_in_two_shards(folder, small, capsys):
    manifest = load_manifest(folder)
    first, second = (folder / entry.name for entry in manifest.shards[:2])
    second.write_bytes(first.read_bytes())
    twin = manifest.shards[0].model_copy(update={"name": second.name})
    shards = (manifest.shards[0], twin, *manifest.shards[2:])
    save_manifest(folder, manifest.model_copy(update={"shards": shards}))
    code, _, err = ran(capsys, "check", folder)
    assert code == 3
    assert err.count(f"the pair lies in shard {first} as well") == manifest.shards[0].count
    assert err.count(f"shard {second}, key ") == manifest.shards[0].count


def test_the_list_is_bounded_and_the_count_is_not(folder, capsys, monkeypatch):
    monkeypatch.setattr(check, "PROBLEMS_PER_SHARD", 2)
    monkeypatch.setattr(check, "PROBLEMS_IN_ALL", 3)
    for path in folder.glob("tier-1-*.tar"):
        for row in range(3):
            flip(path, place(path, row, "latents.npy")[1], b"not numpy")
    report = check_set(folder, load_manifest(folder))
    assert (len(report.problems), report.num_problems, report.num_pairs) == (3, 4 * 4, 8)
    code, _, err = ran(capsys, "check", folder)
    assert (code, len(err.splitlines())) == (3, 5)
    assert "and 13 more" in err


def test_strays_are_named_and_are_no_error(folder, capsys):
    (folder / "tier-1-000009.tar").write_bytes(b"")
    (folder / "tier-1-000001.tar.tmp").write_bytes(b"")
    code, _, err = ran(capsys, "check", folder, "--workers", 1)
    assert code == 0
    assert err.count("is not in the manifest; nothing reads it") == 2


def test_no_set_and_no_sense(tmp_path, capsys):
    code, _, err = ran(capsys, "check", tmp_path / "absent")
    assert (code, err.count("\n")) == (3, 1)
    assert "run prepare first" in err
    for arguments in ([], ["mend", "."], ["check"], ["check", ".", "--workers", "0"]):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 2
