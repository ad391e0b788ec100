"""Every objective through the real trainer: where it starts, that it moves, and what it reports."""

import math
from pathlib import Path

import pytest
from launching import World, losses, metrics


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "at_start"),
    [
        (["objective.loss=ipo"], 0.25),
        (["objective.label_smoothing=0.2", "objective.loser_gradient=0.5"], math.log(2)),
        (["objective.timestep_weighting=min_snr"], math.log(2)),
    ],
    ids=str,
)
def test_preference_losses(world: World, tmp_path: Path, options: list[str], at_start: float):
    world.train(tmp_path, *options, "train.steps=4").succeeded()
    found = losses(tmp_path)
    assert found[0] == pytest.approx(at_start, abs=1e-6)
    assert len(set(found)) == 4
    assert all(row["margin"] is not None for row in metrics(tmp_path))


@pytest.mark.slow
def test_sft_reports_its_loss_and_nothing_it_does_not_know(world: World, tmp_path: Path):
    knobs = ["objective.type=sft", "train.steps=12"]
    outcome = world.train(tmp_path, *knobs, "train.optimizer.lr=1e-2", ranks=2).succeeded()
    rows = metrics(tmp_path)
    assert all(0.1 < row["loss"] < 10 for row in rows)
    for name in ("margin", "accuracy", "winner_error", "loser_error", "margin_q1"):
        assert all(row[name] is None for row in rows)
    assert "unlearning" not in outcome.text
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").exists()
