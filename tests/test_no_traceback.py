"""No traceback: whatever is wrong with a place of a run folder ends in a result or in one line.

Each path of a finished run, one of those that are alike, is made wrong in each way, and each verb
runs in that folder twice: as it is, and with its own result gone so that there is work to do.
`make test` takes some of each fault and verb, the whole grid is `long`.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from launching import VERBS, ForkServer, Outcome, World, make_world
from sweeping import FAULTS, paths, sweep

RESULTS = {
    "prepare": ("shards/manifest.json",),
    "train": ("checkpoints/step-00000006",),
    "compare": ("compare/made_of.json", "compare/base", "compare/report.html"),
}
"""What is taken away so that a verb has work to do: of training the last two steps."""


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


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, server: ForkServer) -> World:
    """A world whose run has been through the three verbs."""
    world = make_world(tmp_path_factory.mktemp("finished"), server, train__sample_every=3)
    for verb in ("train", "compare"):
        server.run(verb, world.recipe, ["monitor.csv=true"]).succeeded()
    return world


def swept(world: World, run: Path, place: str, fault: str, verb: str, works: bool) -> Outcome:
    """The verb as it is, or with work to do."""
    asked = (place, fault, verb, RESULTS[verb] if works else ())
    options = ["monitor.csv=true", "train.log_every=1"]
    return sweep(world, world.folder / "run", run, *asked, options)


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
    swept(finished, tmp_path / "run", place, fault, verb, works).told()


@pytest.mark.long
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("place", PLACES)
def test_every_place_in_every_way(finished: World, tmp_path: Path, place: str, verb: str) -> None:
    for fault, works in itertools.product(FAULTS, (False, True)):
        swept(finished, tmp_path / "run", place, fault, verb, works).told()
