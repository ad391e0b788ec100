"""A checkpoint that rots on the disk, in the part of one rank."""

from __future__ import annotations

from pathlib import Path

import damage
import pytest
from launching import losses

pytestmark = pytest.mark.slow


def test_a_bit_flips_in_the_file_of_one_rank(faults, tmp_path: Path) -> None:
    """Both ranks take the checkpoint before, say so, and come to the same losses."""
    run = tmp_path / "run"
    faults.train(run, "train.steps=4").succeeded()
    (of_rank_1,) = run.glob("checkpoints/step-00000004/deepspeed/*pp_rank_1_*optim_states.pt")
    damage.flip_a_bit(of_rank_1)
    outcome = faults.train(run).succeeded()
    assert "checkpoint step-00000004: " in outcome.output[0] and "passed over" in outcome.output[0]
    assert losses(run) == faults.uninterrupted
