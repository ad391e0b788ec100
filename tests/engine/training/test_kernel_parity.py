"""Real training with `train.kernels` triton, in Triton's interpreter, and torch: the same curves.

Corrupted latents and targets are the same to the bit (tests/kernels), and so is step 0. The loss
kernel sums in another order than PyTorch, so parameters differ by some 1e-7 of a step from then on.
However small a difference is, the networks round anew: 1e-7 of predictions around 1, which moves a
mean squared error by up to 1e-7 (seen: 8e-8). A logit is beta/2 = 250 times a difference of such
errors, in which most of that cancels (seen: 5e-6).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from cdpo.kernels.dispatch import HAS_TRITON
from launching import CALM, ForkServer, World, losses, make_world, metrics

LOG_2 = math.log(2)
TOLERANCES = {
    "loss": 1e-5,
    "grad_norm": 1e-5,
    "margin": 2e-5,
    "winner_error": 2e-7,
    "loser_error": 2e-7,
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"),
]


@pytest.fixture(scope="module")
def interpreted(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The world with a fork server of its own, in which Triton interprets."""
    server = ForkServer(tmp_path_factory.mktemp("interpreted"), {"TRITON_INTERPRET": "1"})
    yield World(world.folder, world.recipe, server)
    server.close()


def model_that_predicts(prediction_type: str, world: World, folder: Path) -> Path:
    """The world's model under another prediction type: the weights are random for any of them."""
    shutil.copytree(world.folder / "sd", folder)
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"prediction_type": prediction_type}))
    return folder


@pytest.mark.parametrize(
    "prediction_type", ["epsilon", pytest.param("v_prediction", marks=pytest.mark.long)]
)
def test_triton_and_torch_train_alike(
    interpreted: World, tmp_path: Path, prediction_type: str
) -> None:
    model = model_that_predicts(prediction_type, interpreted, tmp_path / "sd")
    for kernels in ("torch", "triton"):
        run = tmp_path / kernels
        interpreted.train(run, f"model.path={model}", f"train.kernels={kernels}", *CALM).succeeded()
        assert losses(run)[0] == pytest.approx(LOG_2, abs=1e-6)
    torch_rows, triton_rows = metrics(tmp_path / "torch"), metrics(tmp_path / "triton")
    assert len(torch_rows) == len(triton_rows) == 6
    for name, tolerance in TOLERANCES.items():
        expected = [row[name] for row in torch_rows]
        found = [row[name] for row in triton_rows]
        assert found == pytest.approx(expected, rel=0, abs=tolerance), name
        assert max(map(abs, expected)) > 100 * tolerance, name  # there was something to compare


@pytest.mark.long
def test_a_consistency_model_trains_alike(
    tmp_path_factory: pytest.TempPathFactory, server: ForkServer, interpreted: World, tmp_path: Path
) -> None:
    """Its kernels are alike to the bit but for the loss, so what holds above holds for beta 20."""
    folder = tmp_path_factory.mktemp("lcm")
    lcm = make_world(folder, server, backbone="lcm")
    world = World(folder, lcm.recipe, interpreted.server)
    for kernels in ("torch", "triton"):
        knobs = (f"train.kernels={kernels}", "objective.beta=20", "train.optimizer.eps=1e-6")
        world.train(tmp_path / kernels, *knobs).succeeded()
        assert losses(tmp_path / kernels)[0] == pytest.approx(LOG_2, abs=1e-6)
    found = losses(tmp_path / "triton")
    assert found == pytest.approx(losses(tmp_path / "torch"), rel=0, abs=1e-5)
    assert max(abs(loss - LOG_2) for loss in found) > 1e-4  # there was something to compare
