"""The wheel, installed where only its dependencies are seen: the small world runs from it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from launching import ROOT

BUILT_FROM = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE")
FOLDERS = ("engine", "kernels", "recipes", "ds_configs", "assets")
# The small world cut down to what shows that everything is there.
SMALL = [
    "prompts.limit=2",
    "prepare.candidates_per_prompt=3",
    "prepare.sampler.steps=1",
    "prepare.contact_sheet_prompts=1",
    "curriculum.tiers=1",
    "curriculum.steps_per_tier=1",
    "data.lanes=1",
    "train.steps=3",
    "train.global_batch=2",
    "train.micro_batch=2",
    "train.sample_every=0",
    "deepspeed=zero2",
    "compare.sampler.steps=1",
    "compare.images_per_prompt=1",
    "compare.divergence_draws=0",
    "compare.bootstrap=10",
]


def run(*command: str | Path, folder: Path, code: int = 0) -> str:
    # What is installed is run, and not a tree that PYTHONPATH names.
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    outcome = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=own | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert outcome.returncode == code, outcome.stdout + outcome.stderr
    return outcome.stdout + outcome.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment in which the wheel of this tree is all that is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build in place would leave build/ behind, and read what is there
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    run(*pip, "wheel", *offline, "--no-build-isolation", "-w", folder, source, folder=folder)
    run(sys.executable, "-m", "venv", "--without-pip", "env", folder=folder)
    environment = folder / "env"
    paths = sysconfig.get_paths(vars={"base": str(environment), "platbase": str(environment)})
    # Dependencies are seen through a line of a .pth file; .pth files behind it, by which this tree
    # is installed for the tests, are not read.
    Path(paths["purelib"], "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    (wheel,) = folder.glob("*.whl")
    python = environment / "bin" / "python"
    run(*pip, "--python", python, "install", *offline, wheel, folder=folder)
    where = run(python, "-c", "import cdpo.engine; print(*cdpo.__path__)", folder=folder)
    assert where.split() == [str(Path(paths["purelib"], "cdpo"))]
    return environment


@pytest.mark.slow
def test_the_demo_runs_from_another_folder(installed: Path, tmp_path: Path) -> None:
    cdpo = installed / "bin" / "cdpo"
    run(cdpo, "demo", *SMALL, folder=tmp_path)
    made = tmp_path / "runs" / "emoji_cdpo"
    assert [json.loads(line)["step"] for line in (made / "metrics.jsonl").open()] == [1, 2, 3]
    assert (made / "compare" / "report.html").is_file()
    manifest = json.loads((made / "checkpoints" / "step-00000003" / "MANIFEST.json").read_text())
    assert manifest["zero"] == "zero2"
    assert manifest["identity"]["model.path"] == "assets/emoji/sd"  # as written: it may move
    assert os.listdir(tmp_path) == ["runs"]


@pytest.mark.slow
def test_a_failing_verb_ends_the_demo_with_its_code(installed: Path, tmp_path: Path) -> None:
    said = run(installed / "bin" / "cdpo", "demo", "train.stepz=1", folder=tmp_path, code=2)
    assert said.count("train.stepz") == 1  # of prepare alone
    emoji = next(installed.rglob("assets/emoji"))
    emoji.rename(emoji.with_name("hidden"))
    said = run(installed / "bin" / "cdpo", "demo", folder=tmp_path, code=6)
    emoji.with_name("hidden").rename(emoji)
    assert len(said.splitlines()) == 1 and str(emoji) in said


@pytest.mark.slow
def test_what_is_not_needed_to_run_stays_at_home(installed: Path) -> None:
    (wheel,) = installed.parent.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        data = [name for name in file.namelist() if name.startswith("cdpo/assets/")]
    suffixes = {Path(name).suffix for name in data}
    assert suffixes == {".json", ".md", ".safetensors", ".txt"}
    assert wheel.stat().st_size < 42 << 20  # four models, two scorers, in half precision
