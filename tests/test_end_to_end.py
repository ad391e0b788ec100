"""The three verbs as a user starts them: through the real launcher, on two ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from launching import ROOT, World, losses
from PIL import Image

LAUNCHER = [sys.executable, str(Path(sys.executable).with_name("deepspeed"))]
LAUNCHER += ["--log_level", "error"]


def free_port() -> int:
    """DeepSpeed's own choice is always the same: another run on the machine would have it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(
    verb: str, recipe: Path, *overrides: str, ranks: int = 2, **environment: str
) -> subprocess.CompletedProcess[str]:
    options = ["--num_gpus", str(ranks), "--master_port", str(free_port())]
    return subprocess.run(
        [*LAUNCHER, *options, f"engine/{verb}.py", "--recipe", str(recipe), *overrides],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture
def without_compiler(tmp_path: Path) -> dict[str, str]:
    """DeepSpeed compiles a helper for CPU ranks at first launch, and waits for ever on the lock of
    a build that was killed: we never let it start. Here it finds such locks and no compiler.
    """
    extensions = tmp_path / "extensions"
    for name in ("deepspeed_shm_comm", "cpu_adam", "utils"):
        (extensions / name).mkdir(parents=True)
        (extensions / name / "lock").touch()
    return {"PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(extensions)}


@pytest.mark.slow
def test_train_under_the_launcher(
    world: World, tmp_path: Path, without_compiler: dict[str, str]
) -> None:
    run = tmp_path / "run"
    mine = (f"run_dir={run}", f"data.path={world.shards}")
    outcome = launch("train", world.recipe, *mine, **without_compiler)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert len(outcome.stdout.strip().splitlines()) <= 24, outcome.stdout
    assert len(losses(run)) == 6


@pytest.mark.slow
@pytest.mark.long
def test_prepare_train_compare_under_the_launcher(
    tmp_path: Path, without_compiler: dict[str, str]
) -> None:
    recipe = tiny.build(tmp_path)
    recipe["train"]["sample_every"] = 3
    path, run = tiny.write_recipe(tmp_path / "recipe.yaml", recipe), tmp_path / "run"
    for verb in ("prepare", "train", "compare"):
        outcome = launch(verb, path, **without_compiler)
        assert outcome.returncode == 0, outcome.stdout + outcome.stderr
        lines = outcome.stdout.strip().splitlines()
        assert len(lines) <= 24, "a normal run fits on a screen:\n" + outcome.stdout
    assert Image.open(run / "contact_sheet.png").size > (100, 100)
    assert len(losses(run)) == 6
    results = json.loads((run / "compare" / "results.json").read_text())
    assert "training" in json.dumps(results)
    report = (run / "compare" / "report.html").read_text()
    assert "<html" in report and "http://" not in report.replace("http://www.w3.org", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "arguments", "code", "text"),
    [
        ("train", ["train.stepz=3"], 2, "did you mean train.steps"),
        pytest.param("train", [], 3, "run prepare first", marks=pytest.mark.long),
    ],
)
def test_exit_codes_pass_through_the_launcher(
    tmp_path: Path, verb: str, arguments: list[str], code: int, text: str
) -> None:
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", tiny.build(tmp_path))
    outcome = launch(verb, recipe, *arguments, ranks=1)
    printed = outcome.stdout + outcome.stderr
    assert outcome.returncode == code, printed
    assert text in printed and "Traceback" not in printed
