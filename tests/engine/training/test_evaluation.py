"""Validation while training: what is measured, what is best, when a run ends, what is exported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cdpo.engine.models.latent_diffusion import LatentDiffusion
from cdpo.engine.rewards import load_reward
from cdpo.engine.training.dry_run.plan import evaluation_units
from cdpo.engine.training.evaluation import FILE, Evaluation
from cdpo.engine.training.trainer import Trainer
from launching import KILLED, World, losses
from safetensors.torch import load_file


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "validation.txt"
    path.write_text("a rocket\na green book\na dog\na moon\n")
    return f"prompts.validation={path}"


@pytest.fixture
def evaluation(tiny_recipe, tiny_backbone, ranks, terminal, prompts) -> Evaluation:
    recipe = tiny_recipe(prompts, "evaluate.every=2", "evaluate.prompts=3", "evaluate.images=2")
    Path(recipe.run_dir).mkdir()
    reference = tiny_backbone.denoiser
    return Evaluation(recipe, tiny_backbone, reference, ranks, terminal)


def moved(backbone: LatentDiffusion, by: float) -> torch.nn.Module:
    """The denoiser with another last layer."""
    other = type(backbone.denoiser).from_config(backbone.denoiser.config)
    other.load_state_dict(backbone.denoiser.state_dict())
    with torch.no_grad():
        other.conv_out.weight.mul_(1 + by)
    return other.eval()


def test_due_at_the_start_every_n_steps_and_at_the_end_but_once(evaluation, tiny_backbone):
    assert [step for step in range(7) if evaluation.is_due(step)] == [0, 2, 4, 6]
    evaluation.run(moved(tiny_backbone, 0.1), 2)
    assert [step for step in range(7) if evaluation.is_due(step)] == [0, 4, 6]


def test_a_gain_is_the_scores_of_the_policy_minus_those_of_the_base_from_the_same_noise(
    evaluation, tiny_backbone, tiny_recipe
):
    """By the scorer alone, on pictures drawn one at a time."""
    policy = moved(tiny_backbone, 0.5)
    row = evaluation.run(policy, 2)
    drawn = {net: evaluation._draw(net) for net in (policy, tiny_backbone.denoiser)}
    reward = load_reward(tiny_recipe().reward, torch.device("cpu"))
    expected = np.array(
        [
            reward.score(drawn[policy][prompt], [prompt] * 2)
            - reward.score(drawn[tiny_backbone.denoiser][prompt], [prompt] * 2)
            for prompt in ("a rocket", "a green book", "a dog")
        ]
    )
    assert np.array(row["gains"]) == pytest.approx(expected, abs=1e-6)
    assert row["gain"] == pytest.approx(expected.mean(), abs=1e-6)
    assert row["low"] <= row["gain"] <= row["high"] and row["divergence"] > 0
    first, *_ = drawn[policy]["a rocket"]
    assert len({np.asarray(picture).tobytes() for picture in drawn[policy]["a rocket"]}) == 2
    assert first.size == (16, 16)


def test_the_base_has_no_gain(evaluation, tiny_backbone):
    at_start = evaluation.run(moved(tiny_backbone, 0.5), 0)  # not even drawn: it is the base
    drawn = evaluation.run(tiny_backbone.denoiser, 2)
    for row in (at_start, drawn):
        assert row["gain"] == row["divergence"] == 0 and row["gains"] == [[0, 0]] * 3


def test_the_dry_run_counts_the_rows_of_an_evaluation(evaluation, tiny_backbone):
    policy, rows = moved(tiny_backbone, 0.1), []
    evaluation.run(policy, 2)  # the base's images are drawn once, and not counted
    for net in (policy, tiny_backbone.denoiser):
        net.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    evaluation.run(policy, 4)
    assert sum(rows) == evaluation_units(evaluation.recipe) == 3 * 2 * (2 * 2 + 2 * 4)
    assert evaluation_units(evaluation.recipe, embeds_guidance=True) == 3 * 2 * (2 + 2 * 4)


def test_ranks_share_the_prompts_evenly(evaluation):
    shares = []
    for rank in (0, 1):
        evaluation.ranks = replace(evaluation.ranks, rank=rank, world_size=2)
        vars(evaluation).pop("_share", None)
        shares.append(evaluation._share)
    assert shares == [["a rocket", "a dog"], ["a green book", "a rocket"]]


# --------------------------------------------------------------------------------------------------
# What follows from rows


def judged(evaluation: Evaluation, gains: dict[int, float], stop: int) -> Evaluation:
    """After evaluations that gave these mean gains, all prompts alike but for a little."""
    spread = np.array([[-0.01, 0.01], [0.0, 0.02], [0.01, -0.03]])
    evaluation.spec = evaluation.spec.model_copy(update={"stop": stop})
    evaluation.rows = [
        {"step": step, "gain": gain, "gains": (spread + gain).tolist()}
        for step, gain in gains.items()
    ]
    evaluation._judge()
    return evaluation


@pytest.mark.parametrize(
    ("gains", "stop", "best", "over"),
    [
        ({0: 0.0, 2: 0.3, 4: 0.2, 6: 0.1}, 2, 2, True),
        ({0: 0.0, 2: 0.3, 4: 0.2, 6: 0.1}, 3, 2, False),  # not yet
        ({0: 0.0, 2: 0.3, 4: 0.2, 6: 0.1}, 0, 2, False),  # not asked for
        ({0: 0.0, 2: 0.3, 4: 0.2, 6: 0.31}, 1, 6, False),  # recovered
        ({0: 0.0, 2: -0.3, 4: -0.2}, 2, 0, True),  # never above the base
        ({0: 0.0, 2: 0.3, 4: 0.3}, 1, 2, False),  # of two equal ones the first; not below
        ({0: 0.0}, 1, 0, False),
    ],
)
def test_what_is_best_and_when_it_is_over(evaluation, gains, stop, best, over):
    found = judged(evaluation, gains, stop)
    assert (found.best, found.is_over) == (best, over)


def test_a_fall_within_the_noise_ends_nothing(evaluation):
    found = judged(evaluation, {0: 0.0, 2: 0.3}, 1)
    row = {"step": 4, "gain": 0.29, "gains": [[0.9, -0.3], [0.5, 0.3], [-0.1, 0.44]]}
    found.rows.append(row)
    found._judge()
    assert found.best == 2 and not found.is_over


def test_what_could_not_be_scored_is_never_best(evaluation):
    found = judged(evaluation, {0: 0.0}, 1)
    found.rows.append({"step": 2, "gain": None, "gains": [[None, None]] * 3})
    found._judge()
    assert found.best == 0 and not found.is_over


def test_a_run_whose_last_evaluation_counts_no_more_is_not_finished(evaluation, tiny_backbone):
    exports = SimpleNamespace(is_published=lambda folder: True)
    checkpoints = SimpleNamespace(folder_of=str)
    run = SimpleNamespace(evaluation=evaluation, exports=exports, checkpoints=checkpoints)
    run.cursor, run._is_at_end, run._exported_step = SimpleNamespace(step=6), True, 6
    is_finished = Trainer.is_finished.fget
    assert is_finished is not None and not is_finished(run)
    evaluation.run(tiny_backbone.denoiser, 6)
    assert is_finished(run)


def test_rows_beyond_the_step_or_made_of_something_else_count_no_more(
    evaluation, tiny_backbone, tiny_recipe, ranks, terminal, prompts
):
    policy = moved(tiny_backbone, 0.5)
    for step in (0, 2, 4):
        evaluation.run(policy, step)

    def again(step: int, *settings: str) -> list[int]:
        recipe = tiny_recipe(prompts, "evaluate.every=2", "evaluate.images=2", *settings)
        found = Evaluation(recipe, tiny_backbone, tiny_backbone.denoiser, ranks, terminal)
        found.start_after(step)
        return [row["step"] for row in found.rows]

    assert again(4, "evaluate.prompts=3") == [0, 2, 4]
    assert again(3, "evaluate.prompts=3") == [0, 2]
    assert again(2, "evaluate.prompts=2") == []  # other prompts
    path = Path(tiny_recipe().run_dir) / FILE
    assert path.read_text() == ""  # what does not count would be drawn in the report


# --------------------------------------------------------------------------------------------------
# Whole runs


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / FILE).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def exported(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "lora" / "pytorch_lora_weights.safetensors")


def ups(weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [value for name, value in weights.items() if "lora_B" in name or "lora.up" in name]


SMALL = ("evaluate.every=2", "evaluate.images=1", "evaluate.prompts=3", "checkpoint.every=100")


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    path = tmp_path_factory.mktemp("validation") / "prompts.txt"
    path.write_text("a rocket\na green book\na dog\na moon\n")
    return (f"prompts.validation={path}", *SMALL)


@pytest.fixture(scope="module")
def whole(world: World, options: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    world.train(run, *options, "export.of=best").succeeded()
    return run


def test_the_best_step_is_exported_and_the_last_is_kept(
    world: World, whole: Path, options: tuple[str, ...], uninterrupted: list[float]
) -> None:
    """Evaluating changes nothing of the training, and a second start finds all done."""
    run = whole
    assert losses(run) == uninterrupted
    rows = rows_of(run)
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    best = max(rows, key=lambda row: row["gain"])["step"]
    stamp = json.loads((run / "exported.json").read_text())
    assert stamp["step"] == best and "reward" in stamp["chosen_by"]
    kept = {path.name for path in (run / "checkpoints").glob("step-*")}
    assert {f"step-{best:08d}", "step-00000006"} <= kept
    there = load_file(
        run / "checkpoints" / f"step-{best:08d}" / "lora" / "pytorch_lora_weights.safetensors"
    )
    for name, value in exported(run).items():
        assert torch.equal(value, there[name]), name
    again = world.train(run, *options, "export.of=best").succeeded()
    assert "nothing to do" in again.text


def test_a_run_that_falls_ends_and_leaves_the_best_which_is_the_base(
    world: World, options: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ends = ("evaluate.stop=2", "evaluate.scorers=[{type: python, function: never_better:score}]")
    outcome = world.train(run, *options, *ends, "checkpoint.keep=1").succeeded()
    assert [row["step"] for row in rows_of(run)] == [0, 2, 4]
    assert "step 0" in outcome.text and len(losses(run)) == 4
    stamp = json.loads((run / "exported.json").read_text())
    assert (stamp["step"], stamp["chosen_by"]) == (0, "python never_better:score")
    assert all((up == 0).all() for up in ups(exported(run)))
    again = (*ends, "checkpoint.keep=1")
    assert "nothing to do" in world.train(run, *options, *again).succeeded().text
    world.train(run, *options, *again, "evaluate.stop=0").succeeded()  # it goes on
    assert len(losses(run)) == 6
    assert json.loads((run / "exported.json").read_text())["step"] == 6


@pytest.mark.parametrize(
    "failpoint",
    [pytest.param("evaluate.draw@3", marks=pytest.mark.long), "evaluate.measured@2"],
)
def test_killed_in_an_evaluation_and_started_again(
    world: World, whole: Path, options: tuple[str, ...], tmp_path: Path, failpoint: str
) -> None:
    cut, options = tmp_path / "cut", (*options, "export.of=best")
    assert world.train(cut, *options, failpoint=f"{failpoint}:kill").code == KILLED
    world.train(cut, *options).succeeded()
    assert losses(cut) == losses(whole) and rows_of(cut) == rows_of(whole)
    assert all(torch.equal(v, exported(whole)[name]) for name, v in exported(cut).items())


@pytest.mark.slow
@pytest.mark.parametrize("zero", [pytest.param(2, marks=pytest.mark.long), 3])
def test_two_ranks_find_what_one_finds(
    world: World, options: tuple[str, ...], tmp_path: Path, zero: int
) -> None:
    """Three prompts on two ranks: one of them draws a prompt twice."""
    options = (*options, "train.steps=2", "objective.beta=500", "train.optimizer.eps=1e-6")
    world.train(tmp_path / "one", *options).succeeded()
    world.train(tmp_path / "two", *options, ranks=2, zero=zero).succeeded()
    one, two = (rows_of(tmp_path / name) for name in ("one", "two"))
    assert [row["step"] for row in two] == [0, 2]
    assert two[1]["gain"] == pytest.approx(one[1]["gain"], abs=1e-3)
    assert two[1]["divergence"] == pytest.approx(one[1]["divergence"], rel=0.05)
