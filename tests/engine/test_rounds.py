"""`rounds` as a verb: what it leaves, and that a kill anywhere changes nothing of it."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from cdpo.engine.basics.errors import RecipeError
from cdpo.engine.display.terminal import Terminal
from cdpo.engine.ranks import Ranks
from cdpo.engine.ranks.places import WRITTEN
from cdpo.engine.recipe import Recipe
from cdpo.engine.rounds import main
from diffusers import UNet2DConditionModel
from launching import KILLED, ForkServer, Outcome, World, losses
from peft import LoraConfig, get_peft_model_state_dict
from refusals import refused
from safetensors.torch import load_file
from stock import levels_apart, picture, stock_pipeline
from sweeping import FAULTS, sweep

SMALL = (
    *("prompts.limit=3", "prompts.validation={count: 2}", "evaluate.images=1"),
    *("train.steps=2", "train.micro_batch=8", "curriculum.steps_per_tier=1"),
    *("compare.images_per_prompt=1", "compare.divergence_draws=1"),
)
KEPT = "evaluate.scorers=[{type: python, function: always_better:score}]"
NOT_KEPT = "evaluate.scorers=[{type: python, function: never_better:score}]"


def rounds(
    world: World, run: Path, *overrides: str, failpoint: str = "", ranks: int = 1
) -> Outcome:
    asked = [f"run_dir={run}", *SMALL, *overrides]
    env = {"CDPO_FAILPOINT": failpoint}
    return world.server.run("rounds", world.recipe, asked, ranks=ranks, env=env, seconds=400)


def left(run: Path) -> dict[str, Any]:
    """All that a run is to leave alike, however often it was killed."""
    found: dict[str, Any] = {
        f"round-{number}/{path.name}": path.read_bytes()
        for number in (1, 2)
        for path in sorted((run / f"round-{number}" / "shards").iterdir())
    }
    for folder in ("lora", "after/round-1/lora", "after/round-2/lora"):
        for path in sorted((run / folder).glob("*.safetensors")):  # whose headers have no order
            values = load_file(path).items()
            found[f"{folder}/{path.name}"] = {name: v.numpy().tobytes() for name, v in values}
    found |= {f"losses {number}": losses(run / f"round-{number}") for number in (1, 2)}
    judged = json.loads((run / "rounds.json").read_text())
    found["rounds"] = [{**row, "folder": Path(row["folder"]).name} for row in judged]
    results = json.loads((run / "compare" / "results.json").read_text())
    found["scores"] = [
        [row["scores"] for scorer in prompts["scorers"] for row in scorer["runs"]]
        for prompts in results["prompt_sets"]
    ]
    return found


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    rounds(world, run, KEPT).succeeded()
    return run


@pytest.mark.parametrize("place", ["round-2", "round-2/shards", "round-1/metrics.jsonl"])
def test_a_place_of_any_round_is_looked_at_before_the_first(
    tiny_recipe: Callable[..., Recipe], ranks: Ranks, terminal: Terminal, place: str
) -> None:
    recipe = tiny_recipe("prompts.validation={count: 2}")
    path = Path(recipe.run_dir) / place
    path.parent.mkdir(parents=True)
    path.mkdir() if path.suffix else path.touch()
    with refused(RecipeError, "wrong-type", str(path)):
        main(ranks, recipe, terminal)


def test_what_is_left(whole: Path) -> None:
    """A run folder a round, one adapter of the base, a report that shows the way there; and all of
    it in the places that were looked at before.
    """
    assert [row["kept"] for row in json.loads((whole / "rounds.json").read_text())] == [True, True]
    noise = [
        {path.name: path.read_bytes() for path in (whole / f"round-{n}" / "candidates").iterdir()}
        for n in (1, 2)
    ]
    assert noise[0].keys() == noise[1].keys() and noise[0] != noise[1]  # the prompts are the same
    names = {path.name for path in whole.iterdir()} - {".lock", "round-1", "round-2", "compare"}
    assert names <= {name.rstrip("/") for name in WRITTEN["rounds"].split()}
    results = json.loads((whole / "compare" / "results.json").read_text())
    assert [run["name"] for run in results["runs"]] == ["after round 1", "after round 2"]
    assert [run["rounds"] for run in results["runs"]] == [[1], [1, 2]]


def test_killed_in_the_second_round_and_started_again(
    world: World, whole: Path, tmp_path: Path
) -> None:
    """In a step of it, and between the exports and what says that they are whole."""
    run = tmp_path / "run"
    assert rounds(world, run, KEPT, failpoint="train.step@4:kill").code == KILLED
    assert rounds(world, run, KEPT, failpoint="rounds.exported@2:kill").code == KILLED
    assert not (run / "exported.json").exists()
    rounds(world, run, KEPT).succeeded()
    assert left(run) == left(whole)
    again = rounds(world, run, KEPT).succeeded()
    assert again.text.count("nothing to do") == 5 and left(run) == left(whole)


@pytest.mark.long
def test_where_no_round_gains_there_is_nothing_to_use(world: World, tmp_path: Path) -> None:
    """Until another scorer says otherwise: what is trained is evaluated again."""
    run = tmp_path / "run"
    outcome = rounds(world, run, NOT_KEPT, "rounds.count=1").succeeded()
    assert "round 1 is not kept" in outcome.text and "nothing to export" in outcome.text
    assert not (run / "lora").exists() and not (run / "compare").exists()
    outcome = rounds(world, run, KEPT, "rounds.count=1").succeeded()
    assert "round 1 is kept" in outcome.text and "evaluations were made of other" in outcome.text
    assert (run / "lora").exists() and (run / "compare" / "report.html").exists()


def save_lcm_lora(folder: Path) -> None:
    """What makes the tiny diffusion model a consistency model, or is taken for that."""
    pipeline = tiny.pipeline()
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipeline.unet.add_adapter(config)
    layers = get_peft_model_state_dict(pipeline.unet)
    pipeline.save_lora_weights(folder, unet_lora_layers=layers)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lcm", "lcm_lora"])
def test_all_weights_and_consistency_models(server: ForkServer, tmp_path: Path, kind: str) -> None:
    """What is exported draws on the base what the last round has left."""
    folder, run = tmp_path / "world", tmp_path / "run"
    folder.mkdir()
    recipe = tiny.write_recipe(
        folder / "recipe.yaml", tiny.build(folder, "sd" if kind == "full" else "lcm")
    )
    asked, base = [f"run_dir={run}", *SMALL, KEPT, "train.optimizer.lr=2e-2"], folder / "lcm"
    form, of_last, changes = "lora", "merged", {}
    if kind == "full":
        form, base = "merged", folder / "sd"
        asked += ["adapter.type=full", "export.formats=[merged]"]
    elif kind == "lcm_lora":
        form = of_last = "lora_with_lcm"
        save_lcm_lora(folder / "lcm_lora")
        asked += ["model.unet=null", f"model.lcm_lora={folder / 'lcm_lora'}"]
    else:
        changes["unet"] = UNet2DConditionModel.from_pretrained(folder / "lcm_unet")
    server.run("rounds", recipe, asked, seconds=400).succeeded()
    ours = stock_pipeline(base, run, form, **changes)
    last = stock_pipeline(base, run / "round-2", of_last)
    ours.scheduler = type(last.scheduler).from_config(last.scheduler.config)
    drawn, first = picture(ours), stock_pipeline(base, run / "round-1", of_last)
    assert levels_apart(drawn, picture(last)) <= 0.5
    assert levels_apart(drawn, picture(first)) > 0.5


PHASES = (
    *("prepare.candidates", "prepare.scored", "prepare.latents", "prepare.shard", "train.step"),
    *("checkpoint.manifest", "evaluate.draw", "evaluate.measured", "export.published"),
    *("rounds.judged", "rounds.exported", "compare.diverged", "compare.scored"),
)
# What rank 0 alone passes, or goes on from by itself to what is to be killed next.
OF_FIRST = ("checkpoint.manifest", "rounds.judged", "rounds.exported")


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "before", "reference"),
    [*((ranks, before, "previous") for ranks in (1, 2) for before in (0, 1)), (2, 1, "base")],
)
def test_killed_in_every_phase_of_every_round(
    world: World, tmp_path: Path, ranks: int, before: int, reference: str
) -> None:
    """One phase after the other in one run folder, of the first round, or of a second that is asked
    for when the first is over.
    """
    first, run = tmp_path / "first", tmp_path / "run"
    asked_for = (KEPT, f"rounds.reference={reference}")
    rounds(world, first, *asked_for, ranks=ranks).succeeded()
    starts = [losses(first / f"round-{number}")[0] for number in (1, 2)]
    is_base = reference == "base"
    assert [abs(loss - math.log(2)) < 1e-6 for loss in starts] == [True, not is_base]
    if before:
        rounds(world, run, *asked_for, "rounds.count=1", ranks=ranks).succeeded()
    killed = []
    for phase in PHASES:
        place = f"{phase}{'@2' if before and phase.startswith('rounds') else ''}"
        asked = f"{place}:kill/rank{0 if phase in OF_FIRST else ranks - 1}"
        outcome = rounds(world, run, *asked_for, failpoint=asked, ranks=ranks)
        killed += [phase] * (KILLED in outcome.codes)
    assert killed == list(PHASES)
    rounds(world, run, *asked_for, ranks=ranks).succeeded()
    ours, theirs = left(run), left(first)
    if before:  # the first round was scored in other company, which enters the rounding
        one, other = (np.array(found.pop("scores")).ravel() for found in (ours, theirs))
        assert one == pytest.approx(other, abs=1e-5)
    assert ours == theirs


PLACES = (
    *(".", "after", "after/round-#", "after/round-#/exported.json", "after/round-#/lora"),
    *("after/round-#/recipe.yaml", "compare", "compare/report.html", "evaluations.jsonl"),
    *("exported.json", "lora", "lora/adapter_model.safetensors", "metrics.jsonl", "prompts"),
    *("prompts/train.json", "prompts/validation.json", "recipe.yaml", "round-#"),
    *("round-#/evaluations.jsonl", "round-#/exported.json", "round-#/lora", "round-#/merged"),
    *("round-#/merged/unet", "round-#/shards", "rounds.json"),
)
RESULTS = ("round-2/exported.json", "rounds.json", "after/round-2", "exported.json", "compare")


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_is_wrong_is_a_result_or_one_line(
    world: World, whole: Path, tmp_path: Path, place: str
) -> None:
    """As it is, and with work to do; the places of a round's own verbs in test_no_traceback.py."""
    for fault, results in itertools.product(FAULTS, ((), RESULTS)):
        asked = (place, fault, "rounds", results, (*SMALL, KEPT))
        sweep(world, whole, tmp_path / "run", *asked).told()
