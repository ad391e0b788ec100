"""Two ranks, asked to stop anywhere: both exit 75, and the same command goes on as if never asked.

Each verb is stopped at one place after the other in one run folder, then let finish; what it leaves
is what an uninterrupted run leaves. The request reaches one rank alone, as it may.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from cdpo.engine.ranks.signals import StopSignal
from launching import Outcome, World, losses
from tiny import PICTURES

STOPPED = 75


def stopped(outcome: Outcome) -> None:
    outcome.refused(STOPPED)


@pytest.mark.slow
def test_prepare_in_every_phase(world: World, tmp_path: Path) -> None:
    """One prompt is sampled and one scored at a time, so that there are places to stop at."""
    whole, run = tmp_path / "whole", tmp_path / "run"

    def prepare(failpoint: str = "", folder: Path = run) -> Outcome:
        mine = [f"run_dir={folder}", "prepare.batch_size=6"]
        env = {"CDPO_FAILPOINT": failpoint}
        return world.server.run("prepare", world.recipe, mine, ranks=2, env=env, seconds=400)

    stopped(prepare("prepare.candidates:term/rank1"))
    sampled = {path.name for path in (run / "candidates").rglob("*") if path.is_file()}
    assert sampled and not (run / "scores").exists()
    stopped(prepare("prepare.scoring:term/rank1"))
    assert list((run / "scores").glob("*.parquet"))  # what was scored is kept
    stopped(prepare("prepare.latents:term/rank1"))
    assert list((run / "latents").glob("*.safetensors"))
    stopped(prepare("prepare.shard:term/rank1"))
    assert not (run / "shards" / "manifest.json").exists()
    prepare().succeeded()
    prepare(folder=whole).succeeded()
    made = {path.name: path.read_bytes() for path in (run / "shards").iterdir()}
    assert made == {path.name: path.read_bytes() for path in (whole / "shards").iterdir()}


@pytest.mark.slow
def test_train_and_compare_in_every_phase(world: World, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    world.train(whole, PICTURES, ranks=2, seconds=400).succeeded()
    pictures = {path.name for path in (whole / "samples").glob("*.png")}

    def train(failpoint: str = "") -> Outcome:
        return world.train(run, PICTURES, ranks=2, failpoint=failpoint, seconds=400)

    def saved() -> list[str]:
        return sorted(path.name[-1] for path in (run / "checkpoints").glob("step-*"))

    stopped(train("train.start:term/rank1"))  # while models load
    stopped(train("train.sample:term/rank1"))  # before the first picture
    assert saved() == [] and not list((run / "samples").glob("*.png"))
    # Asked twice: launchers pass a signal on that has reached the ranks already.
    stopped(train("train.step@1:term/rank1,train.loss@2:term/rank1"))
    assert saved() == ["1"]
    stopped(train("checkpoint.synced:term/rank1"))
    assert saved() == ["1", "2"]
    train().succeeded()
    assert losses(run) == losses(whole)
    assert {path.name for path in (run / "samples").glob("*.png")} == pictures

    def compare(failpoint: str = "") -> Outcome:
        mine = [f"run_dir={run}", "compare.batch_size=2"]
        env = {"CDPO_FAILPOINT": failpoint}
        return world.server.run("compare", world.recipe, mine, ranks=2, env=env, seconds=400)

    stopped(compare("compare.scored:term/rank1"))  # sampling is prepare's, see above
    compare().succeeded()
    assert (run / "compare" / "report.html").exists()


@pytest.mark.slow
def test_no_safe_point_within_the_grace_time(world: World, tmp_path: Path) -> None:
    """Rank 1 never comes; rank 0 waits for it in a collective when it is asked to stop."""
    run = tmp_path / "run"
    places = "train.step@3:stall/rank1,train.step@3:term/rank0"
    outcome = world.train(run, "cluster.grace_seconds=2", ranks=2, failpoint=places, seconds=400)
    assert outcome.code == STOPPED, outcome.text
    assert "rank 0" in outcome.text and "cluster.grace_seconds=2" in outcome.text
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000002"]


@pytest.mark.slow
def test_a_rank_that_never_comes_ends_the_run(world: World, tmp_path: Path) -> None:
    limit = "cluster.timeout_minutes=0.2"
    place = "train.step@2:stall/rank1"
    outcome = world.train(tmp_path / "run", limit, ranks=2, failpoint=place, seconds=400)
    assert outcome.code == 6, outcome.text
    assert "rank 0" in outcome.text and "cluster.timeout_minutes" in outcome.text
    assert "Traceback" not in outcome.text


WORKER = """
import pathlib, sys, time
from cdpo.engine.ranks.signals import StopSignal
answer = pathlib.Path(sys.argv[1])
with StopSignal(grace=60, watch_parent=True) as stop:
    answer.write_text("started")
    while not stop.requested:
        time.sleep(0.01)
answer.write_text(stop.reason)
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


def test_workers_notice_that_their_launcher_has_died(tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, WORKER, str(answer)])
    wait_for(answer, "started")
    launcher.kill()
    launcher.wait()
    wait_for(answer, "the launcher has died")


BUSY = """
import pathlib, sys, os
from cdpo.engine.ranks.signals import StopSignal
def overdue(reason):
    print(f"overdue {reason}", flush=True)
    os._exit(75)
with StopSignal(grace=0.5, overdue=overdue):
    pathlib.Path(sys.argv[1]).write_text("started")
    while True:
        sum(range(10**7))  # deaf to handlers for a while
"""


def test_the_grace_time_ends_a_process_that_goes_on(tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    command = [sys.executable, "-c", BUSY, str(answer)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        wait_for(answer, "started")
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=60)[0] == "overdue SIGTERM\n"
    assert process.returncode == STOPPED


def test_a_store_that_does_not_answer_takes_no_grace_time() -> None:
    late = threading.Event()
    with StopSignal(grace=0.1, overdue=lambda reason: late.set()) as stop:
        stop.announce_by(lambda reason: threading.Event().wait())
        stop.request("a test")
        assert late.wait(30)


def wait_for(path: Path, content: str) -> None:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text() == content):
        assert time.monotonic() < deadline, f"{path} never said {content!r}, pid {os.getpid()}"
        time.sleep(0.02)
