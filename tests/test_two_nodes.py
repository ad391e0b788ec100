"""Two machines train together, one is lost, and both go on from the last checkpoint."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import World, losses
from nodes import SECONDS, Node, two_nodes

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not installed")
    try:
        with two_nodes() as pair:
            yield pair
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr}")


def wait_for_step(run: Path, step: int) -> None:
    """Until the run has told of that step."""
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + SECONDS
    while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
        assert time.monotonic() < deadline, f"no step {step} in {SECONDS} seconds"
        time.sleep(0.02)


def test_a_lost_node_costs_the_steps_since_the_checkpoint(
    world: World, nodes: tuple[Node, Node], tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    steps = ["train.steps=40", "checkpoint.every=4", "train.log_every=1"]
    world.train(whole, *steps, ranks=2).succeeded()

    mine = [f"run_dir={run}", f"data.path={world.shards}", "deepspeed=ds_configs/zero2.json"]
    command = ["engine/train.py", "--recipe", str(world.recipe), *mine, *steps]
    command += ["cluster.timeout_minutes=0.1"]
    first, second = nodes
    left, _ = (node.torchrun(first, *command) for node in nodes)
    wait_for_step(run, 5)
    second.lose()
    started = time.monotonic()
    output, _ = left.communicate(timeout=SECONDS)
    assert left.returncode != 0 and time.monotonic() - started < 60, output
    assert 5 <= len(losses(run)) < 40

    second.plug_in()
    for process in [node.torchrun(first, *command) for node in nodes]:
        output, _ = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, output
    assert losses(run) == losses(whole)
