"""Which rounds are kept, from what each begins, and what the kept ones are together."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cdpo.engine.basics.errors import DataError, RecipeError
from cdpo.engine.models import sd
from cdpo.engine.models.adapters import add_lora
from cdpo.engine.ranks import Ranks
from cdpo.engine.recipe import Recipe
from cdpo.engine.recipe.of_rounds import folder_of_round
from cdpo.engine.sources.prompts import read_prompts
from cdpo.engine.training.export_formats import about_adapter, save_for_all, save_merged
from cdpo.engine.training.lora import trained_lora
from cdpo.engine.training.rounds import Round, Series, Sums, refuse_other_run
from peft import get_peft_model_state_dict
from refusals import refused
from safetensors.torch import load_file
from stock import levels_apart, picture, stock_pipeline

VALIDATION = "prompts.validation={count: 2}"
CPU = torch.device("cpu")


@pytest.fixture
def recipe(tiny_recipe: Callable[..., Recipe]) -> Recipe:
    return tiny_recipe(VALIDATION, "adapter.alpha=3.0", "adapter.targets=lcm")


def finish(recipe: Recipe, number: int, gain: float | None, step: int = 6) -> Path:
    """What a round leaves of which nothing but its gain is looked at."""
    folder = folder_of_round(recipe, number)
    folder.mkdir(parents=True, exist_ok=True)
    told = {"step": step, "parts": {}, "precision": "fp32", "changes": [], "number": number}
    (folder / "exported.json").write_text(json.dumps(told))
    rows = [{"step": 0, "gain": 0.0, "low": 0.0, "high": 0.0}]
    if gain is not None:
        rows.append({"step": 6, "gain": gain, "low": gain - 1, "high": gain + 1})
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "metrics.jsonl").write_text("")
    return folder


def test_a_round_that_does_not_gain_is_not_kept_and_the_next_begins_where_it_began(
    recipe: Recipe, ranks: Ranks
) -> None:
    series = Series(ranks, recipe)
    began, told = [], []
    for number, gain in enumerate([0.2, -0.1, None, 0.0, 0.1], start=1):
        began.append(series.next_recipe().model.unet)
        finish(recipe, number, gain)
        told.append(series.told(series.judge()))
    assert [each.kept for each in series.rounds] == [True, False, False, False, True]
    unet = str(folder_of_round(recipe, 1) / "merged" / "unet")
    assert began == [None, unet, unet, unet, unet]
    assert series.next_recipe().model.unet == unet.replace("round-1", "round-5")
    assert "round 1 is kept" in told[0] and "+0.2 [-0.8, +1.2]" in told[0]
    assert "round 2 is not kept, and the next begins where it began" in told[1]
    assert "could not be evaluated" in told[2]
    kept = [row["kept"] for row in json.loads((series.run_dir / "rounds.json").read_text())]
    assert kept == [True, False, False, False, True]


def test_against_the_base_a_round_goes_on_with_the_last_kept_adapter(
    tiny_recipe: Callable[..., Recipe], ranks: Ranks
) -> None:
    recipe = tiny_recipe(VALIDATION, "rounds.reference=base", "adapter.alpha=3.0")
    series = Series(ranks, recipe)
    asked = []
    for number, gain in enumerate([0.2, -0.1, 0.1, 0.1], start=1):
        own = series.next_recipe()
        asked.append((own.model.unet, series.training_of(own)))
        finish(recipe, number, gain)
        series.judge()
    folders = [folder_of_round(recipe, number) for number in (1, 1, 3)]
    assert [unet for unet, _ in asked] == [None, *(str(f / "merged" / "unet") for f in folders)]
    starts = [own.adapter.start for _, own in asked]
    assert starts == [None, *(str(folder / "lora") for folder in folders)]
    assert all(own.model == recipe.model for _, own in asked)


def test_against_the_base_the_last_adapter_is_all_of_it(recipe: Recipe) -> None:
    base = recipe.rounds.model_copy(update={"reference": "base"})
    one = recipe.model_copy(update={"rounds": base})
    first = trained(one, 1, [])
    kept = [first, trained(one, 2, [])]
    assert set(Sums(one, kept).write()) == {"after round 1", "after round 2"}
    run = Path(one.run_dir)
    for last, ours in ((1, run / "after" / "round-1"), (2, run / "after" / "round-2"), (2, run)):
        theirs = load_file(Path(kept[last - 1].folder) / "lora" / "adapter_model.safetensors")
        found = load_file(ours / "lora" / "adapter_model.safetensors")
        assert all(torch.equal(found[name], theirs[name]) for name in {**found, **theirs})
        assert json.loads((ours / "exported.json").read_text())["rounds"] == [last]


def test_the_gain_is_that_of_the_step_that_is_exported(recipe: Recipe, ranks: Ranks) -> None:
    """Where the best is exported, and that is where the round began, nothing is gained."""
    series = Series(ranks, recipe)
    finish(recipe, 1, -0.1, step=0)
    judged = series.judge()
    assert (judged.kept, judged.gain, judged.step) == (False, 0.0, 0)


def test_all_rounds_have_the_prompts_as_they_were_divided_first(
    recipe: Recipe, ranks: Ranks
) -> None:
    """The seed that divides them is another in each round."""
    series, first = Series(ranks, recipe), read_prompts(recipe.prompts, recipe.seed)
    for number in (1, 2):
        own = series.next_recipe()
        assert read_prompts(own.prompts, own.seed) == first
        finish(recipe, number, 0.1)
        series.judge()
    assert len(first.validation) == 2 and first.heldout == tiny.HELDOUT


def test_a_round_that_does_not_tell_is_named(recipe: Recipe, ranks: Ranks) -> None:
    series = Series(ranks, recipe)
    stamp = finish(recipe, 1, 0.1) / "exported.json"
    stamp.write_text("{")
    with refused(DataError, "unreadable", str(stamp)):
        series.judge()


def test_a_run_of_train_is_no_folder_for_rounds(recipe: Recipe) -> None:
    refuse_other_run(recipe)
    (Path(recipe.run_dir) / "checkpoints").mkdir(parents=True)
    with refused(RecipeError, "in-use", "run_dir"):
        refuse_other_run(recipe)


# --------------------------------------------------------------------------------------------------
# What the kept ones are together


def trained(recipe: Recipe, number: int, before: Sequence[Round]) -> Round:
    """A round whose adapter has moved, on what those before it have left."""
    folder = finish(recipe, number, 0.1)
    model = recipe.model
    if before:
        model = model.model_copy(update={"unet": f"{before[-1].folder}/merged/unet"})
    backbone = sd.load(model, CPU, torch.float32)
    policy = add_lora(backbone.denoiser, recipe.adapter, seed=number)
    generator = torch.Generator().manual_seed(number)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    lora = trained_lora(get_peft_model_state_dict(policy), recipe.adapter)
    save_for_all(lora, backbone.pipeline, about_adapter(recipe, backbone), folder / "lora")
    save_merged(model, folder / "lora", folder / "merged", 10**9)
    return Round(number, str(folder), True, 6, "reward", 0.1)


def products(folder: Path) -> dict[str, torch.Tensor]:
    """B A of each layer, in float64."""
    values = load_file(folder / "adapter_model.safetensors")
    return {
        name: values[name].double().flatten(1)
        @ values[name.replace("lora_B", "lora_A")].double().flatten(1)
        for name in values
        if "lora_B" in name
    }


def test_stock_diffusers_draws_on_the_base_what_the_last_round_draws(
    recipe: Recipe, tiny_world: Path
) -> None:
    """The sum of the products is exact; a picture is so to rounding: half a level of 255."""
    one = trained(recipe, 1, [])
    three = trained(recipe, 3, [one])  # the second was not kept
    found = Sums(recipe, [one, three]).write()
    run = Path(recipe.run_dir)
    assert found == {f"after round {n}": str(run / "after" / f"round-{n}") for n in (1, 3)}
    whole = products(run / "lora")
    parts = [products(Path(each.folder) / "lora") for each in (one, three)]
    for name, value in whole.items():
        assert torch.allclose(value, parts[0][name] + parts[1][name], rtol=0, atol=1e-12), name
    assert json.loads((run / "lora" / "adapter_config.json").read_text())["r"] == 4

    base, last = tiny_world / "sd", Path(three.folder)
    drawn = picture(stock_pipeline(base, run, "lora"))
    assert levels_apart(drawn, picture(stock_pipeline(base, last, "merged"))) <= 0.5
    assert levels_apart(drawn, picture(stock_pipeline(base, last, "lora"))) > 1


def test_what_is_there_is_not_written_again_and_goes_when_its_rounds_do(
    recipe: Recipe, tiny_recipe: Any
) -> None:
    rounds = [trained(recipe, 1, [])]
    merged = tiny_recipe(VALIDATION, "export.formats=[kohya, merged]", run="run")
    run = Path(recipe.run_dir)
    Sums(merged, rounds).write()
    assert {"kohya", "merged"} < {path.name for path in run.iterdir()}
    assert not (run / "lora").exists()
    there = (run / "merged" / "unet" / "diffusion_pytorch_model.safetensors").stat()
    sums = Sums(merged, rounds)
    sums.write()
    assert "_base" not in vars(sums)  # nothing was loaded
    first = Path(rounds[0].folder) / "merged" / "unet" / "diffusion_pytorch_model.safetensors"
    assert first.stat().st_ino == there.st_ino  # the same file: a copy would take its size again
    assert Sums(merged, []).write() == {}
    assert not (run / "exported.json").exists() and not (run / "merged").exists()
