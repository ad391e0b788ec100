"""A checkpoint that rots on the disk, in the part of one rank."""

import shutil
from pathlib import Path

import damage
import pytest
from launching import losses

pytestmark = pytest.mark.slow


def test_a_bit_flips_in_the_file_of_one_rank(faults, tmp_path):
    """Both ranks take the checkpoint before, say so, and come to the same losses."""
    run = Path(shutil.copytree(faults.finished, tmp_path / "run", symlinks=True))
    (of_rank_1,) = run.glob("checkpoints/step-00000006/deepspeed/*pp_rank_1_*optim_states.pt")
    damage.flip_a_bit(of_rank_1)
    said = faults.train(run).succeeded().output[0]
    assert "checkpoint step-00000006: " in said and "passed over" in said
    assert "nothing to do" not in said
    assert losses(run) == faults.uninterrupted
