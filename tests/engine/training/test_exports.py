"""Exports of whole runs: they draw what the trainer drew, are found again, and are written once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cdpo.engine.training.exports import STAMP, read_stamp
from launching import KILLED, World, losses
from safetensors.torch import load_file
from stock import assert_draws_what_the_trainer_drew
from torch import Tensor

FULL = ("adapter.type=full", "export.formats=[merged]", "train.optimizer.lr=1e-3")
ENDS = "train.sample_every=6"  # pictures of the first and the last step
UNET = "merged/unet/diffusion_pytorch_model.safetensors"


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Names and bits; the files differ, as safetensors writes metadata in any order."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_an_adapter_in_every_format(world: World, tmp_path: Path) -> None:
    formats = "export.formats=[diffusers,kohya,merged]"
    chosen = ("adapter.targets=lcm", "train.optimizer.lr=0.02", "adapter.ema=0.5", ENDS)
    world.train(tmp_path, formats, *chosen).succeeded()
    for form in ("lora", "kohya", "merged"):
        assert_draws_what_the_trainer_drew(world.folder / "sd", tmp_path, form)
        assert (tmp_path / "ema" / form).is_dir()
    for file in ("lora/pytorch_lora_weights.safetensors", "kohya/lora.safetensors"):
        last, average = load_file(tmp_path / file), load_file(tmp_path / "ema" / file)
        assert last.keys() == average.keys()
        moved = [name for name in last if not torch.equal(last[name], average[name])]
        assert {name for name in last if not name.endswith("alpha")} == set(moved)
        checkpoint = tmp_path / "checkpoints" / "step-00000006"
        assert same(load_file(checkpoint / file), last)
        assert same(load_file(checkpoint / "ema" / file), average)


def test_a_dora_that_was_trained(world: World, tmp_path: Path) -> None:
    formats = "export.formats=[diffusers,merged]"
    chosen = ("adapter.dora=true", "adapter.targets=lcm", "train.optimizer.lr=0.02", ENDS)
    world.train(tmp_path, formats, *chosen).succeeded()
    for form in ("lora", "merged"):
        assert_draws_what_the_trainer_drew(world.folder / "sd", tmp_path, form)


def test_compare_takes_a_full_fine_tune_and_its_average(world: World, tmp_path: Path) -> None:
    average = (*FULL, "adapter.ema=0.9")
    world.train(tmp_path, *average).succeeded()
    reports = []
    for weights in ("last", "ema"):
        overrides = [f"run_dir={tmp_path}", *average, f"compare.weights={weights}"]
        world.server.run("compare", world.recipe, overrides).succeeded()
        results = json.loads((tmp_path / "compare" / "results.json").read_text())
        part = results["prompt_sets"][0]["scorers"][0]
        assert part["base_mean"] != part["tuned_mean"]
        reports.append(part)
    assert reports[0]["base_mean"] == reports[1]["base_mean"]
    assert reports[0]["tuned_mean"] != reports[1]["tuned_mean"]


def test_small_updates_of_bfloat16_weights_are_kept(world: World, tmp_path: Path) -> None:
    """Six steps of 1e-5 are under the spacing of most bf16 numbers, 2**-8 of their size: without
    float32 masters nearly all of them would be rounded away, one by one.
    """
    slow = ("train.optimizer.lr=1e-5", "train.precision=bf16")
    world.train(tmp_path, *FULL, *slow).succeeded()
    base = load_file(world.folder / "sd/unet/diffusion_pytorch_model.safetensors")
    tuned = load_file(tmp_path / UNET)
    moved, shown = [], []
    for name, weights in base.items():
        start = weights.bfloat16().float()
        moved.append((tuned[name] - start).abs().flatten())
        shown.append((tuned[name].bfloat16() != start.bfloat16()).flatten())
    distance, visible = torch.cat(moved), torch.cat(shown).float()
    assert distance.max() <= 6.1e-5
    assert distance.median() > 1e-5
    assert visible.mean() < 0.5


def test_an_extended_run_killed_before_its_last_export_is_not_finished(
    world: World, tmp_path: Path
) -> None:
    run, file = tmp_path / "run", Path("lora", "pytorch_lora_weights.safetensors")
    world.train(run, "train.steps=4").succeeded()
    old = load_file(run / file)
    assert world.train(run, failpoint="export.published:kill").code == KILLED
    assert "nothing to do" not in world.train(run).succeeded().text
    new = load_file(run / file)
    assert same(new, load_file(run / "checkpoints/step-00000006" / file)) and not same(new, old)
    assert "nothing to do" in world.train(run).succeeded().text


def test_another_format_of_a_finished_run_needs_no_training_and_no_shards(
    world: World, tmp_path: Path
) -> None:
    world.train(tmp_path, "train.steps=2").succeeded()
    before = losses(tmp_path)
    gone = ("train.steps=2", f"data.path={tmp_path / 'gone'}", "export.formats=[kohya]")
    outcome = world.train(tmp_path, *gone, ranks=2).succeeded()
    assert "nothing to do" not in outcome.text and losses(tmp_path) == before
    kept = load_file(tmp_path / "kohya" / "lora.safetensors")
    assert same(kept, load_file(tmp_path / "lora" / "kohya.safetensors"))
    assert "nothing to do" in world.train(tmp_path, *gone).succeeded().text


def test_a_damaged_last_checkpoint_takes_shards_again(world: World, tmp_path: Path) -> None:
    world.train(tmp_path).succeeded()
    before = losses(tmp_path)
    next((tmp_path / "checkpoints/step-00000006").rglob("*optim*")).write_bytes(b"")
    world.train(tmp_path, f"data.path={tmp_path / 'gone'}").refused(3, "gone")
    assert "passed over" in world.train(tmp_path).succeeded().text
    assert losses(tmp_path) == before


@pytest.mark.parametrize("text", ["", '{"step": 6', "[]"])
def test_a_damaged_stamp_tells_of_no_exports(tmp_path: Path, text: str) -> None:
    assert read_stamp(tmp_path) == {}
    (tmp_path / STAMP).write_text(text)
    assert read_stamp(tmp_path) == {}
