"""All of the denoiser trained by two ranks under each ZeRO stage: one curve, one result, exact
resume, and an export that no rank holds more of than one file.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import CALM, KILLED, ROOT, World, losses, zero_config
from stock import assert_draws_what_the_trainer_drew, distance, exported_unet

WATCHED = ROOT / "tests" / "workers" / "train_and_watch_gathers.py"
SHARD_GIB = 4e-5  # 42 KiB: the tiny UNet takes several files
FULL = (
    *CALM,
    "adapter.type=full",
    "adapter.ema=0.8",
    "export.formats=[merged]",
    f"export.shard_gib={SHARD_GIB}",
    "train.optimizer.lr=3e-4",
    "train.steps=3",
)


def config(world: World, zero: int) -> Path:
    """Stages 1 to 3; 3 divides all but the small parameters for good."""
    path = world.folder / f"full_zero{zero}.json"
    return zero_config(path, zero, stage3_param_persistence_threshold=1000)


@pytest.fixture(scope="module")
def alone(world: World) -> Path:
    """The run of one rank under ZeRO-2."""
    run = world.folder / "full_alone"
    world.train(run, *FULL).succeeded()
    return run


def test_the_reference_can_wait_in_host_memory(world: World, alone: Path, tmp_path: Path) -> None:
    world.train(tmp_path, *FULL, "train.reference=offload", zero=3).succeeded()
    assert losses(tmp_path) == pytest.approx(losses(alone), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero", "kill"),
    [
        (2, False),
        (3, True),
        *(pytest.param(zero, True, marks=pytest.mark.long) for zero in (1, 2)),
    ],
)
def test_two_ranks_under_each_stage(
    world: World, alone: Path, tmp_path: Path, zero: int, kill: bool
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"

    def train(folder: Path, *more: str, failpoint: str = "") -> list[int]:
        overrides = [
            f"run_dir={folder}",
            f"data.path={world.shards}",
            f"deepspeed={config(world, zero)}",
        ]
        env = {"CDPO_FAILPOINT": failpoint, "WATCH_FOLDER": str(tmp_path)}
        return world.server.run(
            WATCHED, world.recipe, [*overrides, *FULL, *more], ranks=2, env=env
        ).codes

    assert train(whole, "train.sample_every=3") == [0, 0]
    assert losses(whole) == pytest.approx(losses(alone), abs=1e-5)
    assert distance(exported_unet(whole), exported_unet(alone)) < 1e-5
    assert distance(exported_unet(whole, "ema"), exported_unet(alone, "ema")) < 1e-5
    assert distance(exported_unet(whole), exported_unet(whole, "ema")) > 1e-4
    assert_draws_what_the_trainer_drew(world.folder / "sd", whole, "merged", step=3)
    assert_one_file_at_a_time(whole, tmp_path)
    if not kill:
        return
    assert KILLED in train(run, failpoint="train.loss@3:kill/rank1")
    assert train(run) == [0, 0]
    assert losses(run) == losses(whole)
    assert distance(exported_unet(run), exported_unet(whole)) == 0
    assert distance(exported_unet(run, "ema"), exported_unet(whole, "ema")) == 0


def assert_one_file_at_a_time(run: Path, notes: Path) -> None:
    """Rank 0 held one file and the parameter that was being gathered, rank 1 only the latter."""
    weights = exported_unet(run)
    files = list((run / "merged" / "unet").glob("*.safetensors"))
    assert len(files) > 2
    largest = 4 * max(value.numel() for value in weights.values())
    bound = SHARD_GIB * 2**30
    for rank, most in enumerate((bound + largest, largest)):
        seen = json.loads((notes / f"gathered-{rank}.json").read_text())
        assert seen["gathered"] == 2 * len(weights)  # last and averaged
        assert largest <= seen["most"] <= most + 64  # ZeRO-3 pads to equal shares
    total = 4 * sum(value.numel() for value in weights.values())
    assert total > 2.5 * bound
