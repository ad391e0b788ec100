"""The clock jumps; a second run starts in the same folder."""

import contextlib
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from launching import ROOT, ForkServer, losses
from shard_server import serving

pytestmark = pytest.mark.slow
WORKERS = ROOT / "tests" / "workers"
YEAR = 365 * 24 * 3600
SECONDS = 200


def test_the_clock_jumps(faults, tmp_path):
    """In the middle of a run, forward on one rank and back on the other; and before it is resumed
    all files are dated anew, the older checkpoint as the newer one. Waits are measured by a clock
    that does not jump, and what is newest goes by step.
    """
    run = faults.up_to_step_4(tmp_path / "run")
    paths = sorted(path for path in run.rglob("*") if not path.is_symlink())
    for age, path in enumerate(paths):
        os.utime(path, (10**9 - age, 10**9 - age))
    with serving(faults.world.shards, chunk=512) as web:
        mine = (f"data.path={web.url}", f"data.cache={tmp_path / 'cache'}")
        env, script = {"JUMP": str(YEAR)}, WORKERS / "jump_clock.py"
        said = faults.train(run, *mine, script=script, env=env).succeeded().output[0]
    assert "train (resumed)" in said
    assert losses(run) == faults.uninterrupted


def test_two_runs_in_one_folder(faults, of_all_processes, tmp_path):
    """The second is refused, on all its ranks; the first, in the middle of its third step, is not
    disturbed.
    """
    run, waits, go = tmp_path / "run", tmp_path / "waits", tmp_path / "go"
    env, script = {"WAITS": str(waits), "GO": str(go)}, WORKERS / "wait_at_step_3.py"
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(faults.train, run, script=script, env=env)
        try:
            deadline = time.monotonic() + SECONDS
            while not waits.exists() and not first.done() and time.monotonic() < deadline:
                time.sleep(0.02)
            # The session's own connection waits for the first run.
            with contextlib.closing(ForkServer(of_all_processes)) as server:
                second = server.run("train", faults.world.recipe, [f"run_dir={run}"], ranks=2)
        finally:
            go.touch()
        first.result().succeeded()
    assert second.codes == [2, 2], second.text
    assert f"error: run_dir {run} " in second.output[0].replace("\n", " ")
    assert "Traceback" not in second.text
    assert losses(run) == faults.uninterrupted
