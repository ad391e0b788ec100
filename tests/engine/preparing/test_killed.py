"""Stage 1 on two real ranks, killed in every phase: nothing is lost, repeated or half-written."""

from pathlib import Path

import pytest
from cdpo.engine.shards.manifest import load_manifest
from launching import KILLED
from prepared import contents


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """What tells that a file was not written again."""
    found = {path.name: path.stat() for path in folder.glob("*.tar")}
    return {name: (state.st_ino, state.st_mtime_ns) for name, state in found.items()}


@pytest.mark.slow
def test_two_ranks_killed_in_every_phase(world, tmp_path):
    """The same recipe goes on after each SIGKILL, and ends with the shards of an unbroken run of
    one rank.
    """

    def prepare(run: str, failpoint: str = "") -> list[int]:
        mine, env = [f"run_dir={tmp_path / run}"], {"CDPO_FAILPOINT": failpoint}
        outcome = world.server.run("prepare", world.recipe, mine, ranks=2, env=env)
        assert failpoint or set(outcome.codes) == {0}, outcome.text
        return outcome.codes

    whole, run = world.folder / "run", tmp_path / "run"
    kept: dict[str, tuple[int, int]] = {}
    for failpoint in (
        "prepare.candidates@1:kill/rank1",
        "prepare.scored:kill/rank0",
        "prepare.latents@1:kill/rank0",
        "prepare.shard@2:kill/rank1",
    ):
        assert KILLED in prepare("run", failpoint), failpoint
        assert not (run / "shards" / "manifest.json").exists()
        now = stamps(run / "candidates")
        assert kept.items() <= now.items(), f"candidates sampled again before {failpoint}"
        kept = now
    assert kept.keys() == contents(whole / "candidates").keys()
    # As a rank leaves it that dies in the middle of a shard.
    (run / "shards" / "tier-1-000000.tar.tmp").write_bytes(b"half of one")
    prepare("run")
    assert stamps(run / "candidates") == kept
    assert contents(run / "candidates") == contents(whole / "candidates")
    assert contents(run / "shards") == contents(whole / "shards")
    names = {entry.name for entry in load_manifest(run / "shards").shards}
    assert {path.name for path in (run / "shards").iterdir()} == names | {"manifest.json"}
