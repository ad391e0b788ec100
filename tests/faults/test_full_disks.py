"""A disk that is really full: a small one in memory, where this system lets us mount one, and
files that the system lets grow no further, which it does everywhere.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import ROOT, VERBS, ForkServer, Outcome, World, losses, make_world
from prepared import contents
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MiB."""
    yield from mounted(tmp_path / "disk")


def mounted(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a tmpfs is not allowed here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Take all but ``leave`` bytes; returns the file to remove."""
    state = os.statvfs(disk)
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, state.f_bavail * state.f_frsize - leave)
    return ballast


def test_in_a_checkpoint(faults, disk):
    """The one before stays, and with room again the run goes on from it."""
    run = faults.up_to_step_4(disk / "run")
    ballast = fill(disk, leave=64 * 1024)
    faults.train(run).refused(5, "step-00000006")
    names = {path.name for path in run.glob("checkpoints/step-*")}
    assert names == {"step-00000002", "step-00000004"}
    ballast.unlink()
    faults.train(run).succeeded()
    assert losses(run) == faults.uninterrupted


def test_in_prepare(faults, disk):
    """No manifest is there until the set is whole; with room again it is the same set."""
    run = disk / "run"
    ballast = fill(disk, leave=256 * 1024)
    faults.prepare(run).refused(3, str(run))
    assert not (run / "shards" / "manifest.json").exists()
    ballast.unlink()
    faults.prepare(run).succeeded()
    assert contents(run / "shards") == contents(faults.world.shards)


def test_in_prepare_for_one_rank_alone(faults, tmp_path):
    """The other is told, and does not go on with its share for hours to wait in vain."""
    outcome = faults.prepare(tmp_path / "run", failpoint="shard.write@2:enospc/rank1")
    assert outcome.codes == [3, 3], outcome.text
    assert "No space left on device" in outcome.output[1] and "Traceback" not in outcome.text


@pytest.mark.parametrize(
    ("formats", "code", "place"),
    [
        ("[diffusers]", 5, "checkpoint step-00000006 cannot be written"),  # by torch
        ("[merged]", 6, "exported.tmp/merged/unet"),  # by safetensors
    ],
)
def test_in_what_libraries_write(
    world: World, uninterrupted: list[float], tmp_path: Path, formats: str, code: int, place: str
) -> None:
    run, formats = tmp_path / "run", f"export.formats={formats}"
    shutil.copytree(world.folder / "uninterrupted", run)
    if code == 5:
        shutil.rmtree(run / "checkpoints" / "step-00000006")
    env = {"CDPO_VERB": "train", "CDPO_LARGEST": str(100 * 2**10)}
    full = ROOT / "tests" / "workers" / "no_large_file.py"
    world.train(run, formats, script=full, env=env).refused(code, place)
    if code == 6:
        world.train(run, formats).succeeded()
        assert load_file(run / "merged" / "unet" / "diffusion_pytorch_model.safetensors")
        assert losses(run) == uninterrupted and not (run / "exported.tmp").exists()


# --------------------------------------------------------------------------------------------------
# Any room there may be

KNOBS = (
    *("train.sample_every=3", "train.log_every=1", "monitor.csv=true", "adapter.ema=0.9"),
    *("export.formats=[diffusers,kohya,merged]", "evaluate.every=3", "evaluate.prompts=2"),
    "evaluate.images=1",
)
# Locks, hashes of the files below, names drawn at random, and what DeepSpeed's tracker adds to.
OWN = (".lock", ".shards.lock", "MANIFEST.json", "exported.json", "*.scores", "csv/*")
STEPS = 24  # sizes of the disk, up to what a verb takes


class Stages:
    """A run on a disk that nothing happened to, as it was ahead of each verb and at the end."""

    def __init__(self, folder: Path, disk: Path, server: ForkServer) -> None:
        self.folder, self.disk, self.run = folder, disk, disk / "run"
        self.world = make_world(folder / "world", server)
        prompts = folder / "validation.txt"
        prompts.write_text("a rocket\na green book\n")
        self.knobs = (*KNOBS, f"run_dir={self.run}", f"prompts.validation={prompts}")
        self.taken, self.result = {}, {}
        for verb in VERBS:
            if self.run.exists():
                shutil.copytree(self.run, folder / verb)
            before = os.statvfs(disk).f_bavail
            self.start(verb).succeeded()
            self.taken[verb] = (before - os.statvfs(disk).f_bavail) * os.statvfs(disk).f_frsize
            self.result[verb] = what_lies_in(self.run)

    def start(self, verb: str) -> Outcome:
        return self.world.server.run(verb, self.world.recipe, self.knobs)

    def ahead_of(self, verb: str) -> None:
        shutil.rmtree(self.run, ignore_errors=True)
        if (self.folder / verb).exists():
            shutil.copytree(self.folder / verb, self.run)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory, server: ForkServer) -> Iterator[Stages]:
    folder = tmp_path_factory.mktemp("stages")
    for disk in mounted(folder / "disk"):
        yield Stages(folder, disk, server)


def what_lies_in(run: Path) -> dict[str, object]:
    """What two runs have alike: content of files, of tables without times, tensors."""
    found: dict[str, object] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.is_dir() or any(path.match(own) for own in OWN):
            continue
        if path.suffix == ".safetensors":  # the order in its header is another each time
            found[name] = {key: value.tolist() for key, value in load_file(path).items()}
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            times = {"seconds", "pairs_per_second"}
            found[name] = [{k: v for k, v in row.items() if k not in times} for row in rows]
        else:
            found[name] = path.read_bytes()
    return found


@pytest.mark.long
@pytest.mark.parametrize("verb", VERBS)
def test_whatever_room_there_is(stages: Stages, verb: str) -> None:
    """From none to just too little: one line; and with room again the result is the same."""
    rooms = [stages.taken[verb] * step // STEPS for step in range(STEPS)]
    codes = []
    for room in [*rooms, 8192, stages.taken[verb] - 4096]:
        stages.ahead_of(verb)
        ballast = fill(stages.disk, leave=room)
        codes.append(stages.start(verb).told().code)
        ballast.unlink()
        stages.start(verb).succeeded()
        assert what_lies_in(stages.run) == stages.result[verb], room
    assert codes.count(0) < STEPS / 2
