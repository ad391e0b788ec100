"""No traceback: whatever is wrong with a place of a run folder ends in a result or in one line.

Each path of a finished run, one of those that are alike, is made wrong in each way, and each verb
runs in that folder twice: as it is, and with its own result gone so that there is work to do.
`make test` takes some of each fault and verb, the whole grid is `long`.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import VERBS, ForkServer, Outcome, World, make_world

REFUSING = Path(__file__).parent / "workers" / "refusing.py"
RESULTS = {
    "prepare": ("shards/manifest.json",),
    "train": ("checkpoints/step-00000006",),
    "compare": ("compare/made_of.json", "compare/base", "compare/report.html"),
}
"""What is taken away so that a verb has work to do: of training the last two steps."""


def swap(path: Path) -> None:
    """A file where a folder is, a folder with something in it where a file is."""
    if path.is_dir():
        absent(path)
        path.write_text("a file")
    else:
        path.unlink()
        path.mkdir()
        (path / "in it").touch()


def absent(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def empty(path: Path) -> None:
    absent(path)
    path.mkdir() if not path.suffix else path.touch()


def torn(path: Path) -> None:
    """The first half of a file, or of the files in a folder."""
    inside = sorted(path.iterdir())[::2] if path.is_dir() else []
    for half in inside:
        absent(half)
    if path.is_file():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, Callable[[Path], None]] = {
    each.__name__: each for each in (swap, absent, empty, torn)
}
FAULTS = (*DAMAGES, "EROFS", "EACCES", "ENOSPC")
PLACES = (
    ".",
    *(".lock", ".shards.lock", "candidates", "candidates/#.tar"),
    *("checkpoints", "checkpoints/latest", "checkpoints/step-#"),
    *("checkpoints/step-#/MANIFEST.json", "checkpoints/step-#/deepspeed"),
    *("checkpoints/step-#/lora", "checkpoints/step-#/recipe.yaml"),
    "checkpoints/step-#/deepspeed/mp_rank_#_model_states.pt",
    "checkpoints/step-#/deepspeed/zero_pp_rank_#_layout.json",
    "checkpoints/step-#/deepspeed/zero_pp_rank_#_mp_rank_#_optim_states.pt",
    "checkpoints/step-#/lora/pytorch_lora_weights.safetensors",
    *("compare", "compare/base", "compare/base/#.tar", "compare/divergence"),
    *("compare/divergence/#.safetensors", "compare/made_of.json", "compare/recipe.yaml"),
    *("compare/report.html", "compare/results.json", "compare/scores", "compare/scores/#"),
    *("compare/scores/#.safetensors", "compare/scores/#/#.scores", "compare/side_by_side.png"),
    *("compare/tuned", "compare/tuned/#.tar", "contact_sheet.png", "csv", "csv/train_loss.csv"),
    *("exported.json", "lora", "lora/adapter_config.json", "lora/adapter_model.safetensors"),
    *("lora/kohya.safetensors", "lora/pytorch_lora_weights.safetensors", "metrics.jsonl"),
    *("recipe.yaml", "samples", "samples/step-#.png", "score_cache", "score_cache/#"),
    *("score_cache/#/#.scores", "scores.parquet", "shards", "shards/manifest.json"),
    "shards/tier-#-#.tar",
)


def like(name: str) -> str:
    """A place by what it is, whatever its number or hash."""
    return re.sub(r"(?<=[-/_])([0-9a-f]{32}|[0-9a-f]{16}|\d+)(?=[-/_.]|$)", "#", name)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, server: ForkServer) -> World:
    """A world whose run has been through the three verbs."""
    world = make_world(tmp_path_factory.mktemp("finished"), server, train__sample_every=3)
    for verb in ("train", "compare"):
        server.run(verb, world.recipe, ["monitor.csv=true"]).succeeded()
    return world


def paths(run: Path) -> dict[str, Path]:
    """The places of a run folder; of those that are alike the last, which is the newest."""
    found = {like(str(path.relative_to(run))): path for path in sorted(run.rglob("*"))}
    found = {name: path for name, path in found.items() if not name.startswith("csv/")}
    return {".": run, "csv/train_loss.csv": run / "csv/train_loss.csv", **found}


def sweep(world: World, run: Path, place: str, fault: str, verb: str, works: bool) -> Outcome:
    """A verb in a copy of the finished run in which one place is wrong."""
    shutil.copytree(world.folder / "run", run)
    path = paths(run)[place]
    if works:
        for name in RESULTS[verb]:
            absent(run / name)
        if not os.path.lexists(path):  # it is the result itself: what is to be written is refused
            path.parent.mkdir(parents=True, exist_ok=True)
    damage = DAMAGES.get(fault)
    if damage and os.path.lexists(path):
        damage(path)
    script, env = verb, {}
    if damage is None:
        script = REFUSING
        env = {"CDPO_VERB": verb, "CDPO_PLACE": str(path), "CDPO_REFUSE": fault}
    options = [f"run_dir={run}", "monitor.csv=true", "train.log_every=1"]
    outcome = world.server.run(script, world.recipe, options, env=env)
    shutil.rmtree(run, ignore_errors=True)
    run.unlink(missing_ok=True)
    return outcome


CASES = list(itertools.product(PLACES, FAULTS, VERBS, (False, True)))
CHOSEN = [
    *(("samples/step-#.png", "empty", "compare", True), ("exported.json", "torn", "train", False)),
    *((".", "EROFS", "prepare", False), (".", "ENOSPC", "train", False)),
    *(("samples", "swap", "train", True), ("samples/step-#.png", "EROFS", "train", True)),
    ("exported.json", "ENOSPC", "train", True),
    *(("shards", "ENOSPC", "prepare", True), ("contact_sheet.png", "swap", "prepare", True)),
    *(("shards/tier-#-#.tar", "torn", "train", True), ("lora", "absent", "compare", False)),
    ("lora", "empty", "compare", True),
    *(
        *(("compare/base", "swap", "compare", True), ("metrics.jsonl", "EACCES", "train", True)),
        ("compare/results.json", "EROFS", "compare", True),
    ),
]


def test_the_places_are_those_of_a_run(finished: World) -> None:
    assert set(paths(finished.folder / "run")) == set(PLACES)


@pytest.mark.parametrize(("place", "fault", "verb", "works"), CHOSEN)
def test_one_line_or_a_result(
    finished: World, tmp_path: Path, place: str, fault: str, verb: str, works: bool
) -> None:
    sweep(finished, tmp_path / "run", place, fault, verb, works).told()


@pytest.mark.long
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("place", PLACES)
def test_every_place_in_every_way(finished: World, tmp_path: Path, place: str, verb: str) -> None:
    for fault, works in itertools.product(FAULTS, (False, True)):
        sweep(finished, tmp_path / "run", place, fault, verb, works).told()
