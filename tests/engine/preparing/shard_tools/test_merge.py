"""`cdpo shards merge`: one set out of several, as one prepare would have made it."""

import contextlib
import os
import signal

import pytest
from cdpo.engine.preparing.shard_tools import merge
from cdpo.engine.preparing.shard_tools.command import main
from cdpo.engine.shards.manifest import RewardSource, Statistics, load_manifest, save_manifest
from cdpo.engine.shards.reader import ShardReaders
from cdpo.engine.shards.writer import write_shard


@pytest.fixture
def write(small, tmp_path):
    """Write a set of given pairs a tier, numbers of prompts, one shard a lane."""

    def write(name, numbers_by_tier, **changes):
        folder = tmp_path / name
        folder.mkdir()
        entries = []
        for tier, numbers in enumerate(numbers_by_tier, 1):
            metas = [small.meta(tier, number) for number in numbers]
            for lane in range(2):
                samples = [(meta, small.latents(meta)) for meta in metas[lane::2]]
                path = folder / f"tier-{tier}-{lane:06d}.tar"
                entries.append(write_shard(path, samples, small.CONTENTS))
        save_manifest(folder, small.manifest(entries, 2, len(numbers_by_tier), **changes))
        return folder

    return write


def contents(folder):
    """{pair id: (record, latents)} of a whole set."""
    manifest = load_manifest(folder)
    readers = ShardReaders(folder, manifest)
    samples = [
        readers.read(entry, index) for entry in manifest.shards for index in range(entry.count)
    ]
    found = {sample.pair_id: (sample.meta, sample.images.tobytes()) for sample in samples}
    assert len(found) == len(samples)
    return found


def test_every_pair_is_there_once_and_unchanged(write, tmp_path, capsys):
    a, b = write("a", [range(8), range(4)]), write("b", [range(20, 24), range(20, 28)])
    assert main(["merge", str(a), str(b), "--into", str(tmp_path / "c")]) == 0
    assert "24 pairs in 8 shards\n" in capsys.readouterr().out
    assert contents(tmp_path / "c") == contents(a) | contents(b)
    assert main(["check", str(tmp_path / "c")]) == 0
    manifest = load_manifest(tmp_path / "c")
    assert {entry.count for entry in manifest.shards if entry.tier == 1} == {3}
    assert not (tmp_path / "c.partial").exists()


def test_a_merge_is_what_one_prepare_would_have_made(small, write, tmp_path):
    """Byte for byte, whatever the order of the sets."""
    a, b = write("a", [range(6), range(4)]), write("b", [range(6, 12), range(4, 8)])
    whole = small.write_set(tmp_path / "whole", 2, [12, 8], 3)
    for name, sets in (("ab", (a, b)), ("ba", (b, a))):
        into = str(tmp_path / name)
        assert main(["merge", *map(str, sets), "--into", into, "--pairs-per-shard", "3"]) == 0
        assert load_manifest(into).shards == whole.shards
    assert load_manifest(tmp_path / "ab") == load_manifest(tmp_path / "ba")


def test_statistics_add_up(write, tmp_path):
    some = Statistics(prompts=5, candidates=9, dropped_remainder_by_tier=(1,), imported={"rows": 2})
    a = write("a", [range(6)], statistics=some)
    b = write("b", [range(6, 11 + 1)], statistics=some.model_copy(update={"imported": None}))
    arguments = ["merge", str(a), str(b), "--into", str(tmp_path / "c"), "--pairs-per-shard", "5"]
    assert main(arguments) == 0
    merged = load_manifest(tmp_path / "c").statistics
    assert (merged.prompts, merged.candidates, merged.imported) == (10, 18, {"rows": 2})
    assert merged.pairs_by_tier == (12,)
    assert merged.dropped_remainder_by_tier == (2,)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"resolution": (32, 32)}, "resolution is (16, 16) in the first and (32, 32)"),
        ({"reward": RewardSource(path="r", fingerprint="other", type="clip_score")}, "reward."),
    ],
)
def test_sets_that_do_not_belong_together(write, tmp_path, capsys, changes, key):
    a, b = write("a", [range(4)]), write("b", [range(4, 8)], **changes)
    assert main(["merge", str(a), str(b), "--into", str(tmp_path / "c")]) == 3
    error = capsys.readouterr().err
    assert f"{a} and {b} cannot be merged: {key}" in error
    assert not (tmp_path / "c").exists()


def test_another_number_of_tiers_or_vae(small, write, tmp_path, capsys):
    a, b = write("a", [range(4)]), write("b", [range(4, 8), range(4)])
    assert main(["merge", str(a), str(b), "--into", str(tmp_path / "c")]) == 3
    assert "tiers is 1 in the first and 2 in the second" in capsys.readouterr().err
    vae = load_manifest(a).vae.model_copy(update={"fingerprint": "e"})
    c = write("other", [range(4, 8)], vae=vae)
    assert main(["merge", str(a), str(c), "--into", str(tmp_path / "c")]) == 3
    assert "vae.fingerprint is b in the first and e in the second" in capsys.readouterr().err


def test_a_pair_in_two_sets(write, small, tmp_path, capsys):
    a, b = write("a", [range(4)]), write("b", [range(3, 7)])
    assert main(["merge", str(a), str(b), "--into", str(tmp_path / "c")]) == 3
    key = f"{small.meta(1, 3).pair_id:016x}"
    assert f"1 pairs come up twice, e.g. {key} in {a} and in {b}" in capsys.readouterr().err
    assert main(["merge", str(a), str(a), "--into", str(tmp_path / "c")]) == 3


def test_a_damaged_shard_ends_it(write, tmp_path, capsys):
    a, b = write("a", [range(4)]), write("b", [range(4, 8)])
    (b / "tier-1-000001.tar").write_bytes(b"x")
    assert main(["merge", str(a), str(b), "--into", str(tmp_path / "c")]) == 3
    assert f"shard {b}/tier-1-000001.tar: truncated" in capsys.readouterr().err


def test_a_folder_that_is_taken(write, tmp_path, capsys):
    a, b = write("a", [range(4)]), write("b", [range(4, 8)])
    into = tmp_path / "c"
    arguments = ["merge", str(a), str(b), "--into", str(into)]
    assert main([*arguments[:3], "--into", str(a)]) == 2
    assert "is there already and is not this merge" in capsys.readouterr().err
    assert main(arguments) == 0
    assert main(arguments) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main([*arguments, "--pairs-per-shard", "1"]) == 2
    (into / "tier-1-000000.tar").unlink()
    assert main(arguments) == 3
    (tmp_path / "d.partial").mkdir()
    (tmp_path / "d.partial" / "thesis.tex").write_text("mine")
    assert main(["merge", str(a), str(b), "--into", str(tmp_path / "d")]) == 2
    assert (tmp_path / "d.partial" / "thesis.tex").exists()


def test_a_killed_merge_leaves_no_set_and_starts_over(write, tmp_path, capsys):
    a, b = write("a", [range(8)]), write("b", [range(8, 16)])
    arguments = ["merge", str(a), str(b), "--into", str(tmp_path / "c"), "--pairs-per-shard", "2"]
    if not (child := os.fork()):
        os.environ["CDPO_FAILPOINT"] = "merge.shard@3:kill"
        with contextlib.suppress(BaseException):
            main(arguments)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / "c").exists()
    assert len(list((tmp_path / "c.partial").iterdir())) == 2
    (tmp_path / "c.partial" / "tier-1-000099.tar").write_bytes(b"of another plan")
    (tmp_path / "c.partial" / "tier-1-000002.tar.tmp").write_bytes(b"half")
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert (
        f"{tmp_path}/c.partial was left by a merge that was killed" in captured.out + captured.err
    )
    assert contents(tmp_path / "c") == contents(a) | contents(b)
    assert len(list((tmp_path / "c").iterdir())) == 8 + 1
    assert not (tmp_path / "c.partial").exists()


def test_a_full_disk_is_one_line(write, tmp_path, capsys, fill_disk):
    a, b = write("a", [range(4)]), write("b", [range(4, 8)])
    fill_disk()
    assert main(["merge", str(a), str(b), "--into", str(tmp_path / "c")]) == 3
    [line] = capsys.readouterr().err.splitlines()
    assert "cannot write" in line
    assert "No space left" in line
    assert not (tmp_path / "c").exists() and not (tmp_path / "c.partial").exists()


def test_interrupting_leaves_nothing(write, tmp_path, monkeypatch):
    a, b = write("a", [range(4)]), write("b", [range(4, 8)])

    def interrupt(name):
        assert list((tmp_path / "c.partial").iterdir()) == []
        raise KeyboardInterrupt

    monkeypatch.setattr(merge, "failpoint", interrupt)
    assert main(["merge", str(a), str(b), "--into", str(tmp_path / "c")]) == 130
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
