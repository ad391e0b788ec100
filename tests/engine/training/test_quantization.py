"""Runs on a base in fewer bits: killed and resumed, under each ZeRO stage, and what they export."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from cdpo.engine.models.quantization import LIBRARIES
from cdpo.engine.training.exports import read_stamp
from launching import CALM, KILLED, World, losses
from safetensors.torch import load_file
from stock import denoiser_weights, exported_unet

pytestmark = pytest.mark.slow


def here(kind: str, *, long: bool = False) -> object:
    missing = importlib.util.find_spec(LIBRARIES[kind]) is None
    why = f"{LIBRARIES[kind]} is not installed: pip install '.[quantization]'"
    skip = pytest.mark.skipif(missing, reason=why)
    return pytest.param(kind, marks=(skip, pytest.mark.long) if long else skip)


@pytest.mark.parametrize("kind", [here("nf4"), here("int8", long=True), here("fp8", long=True)])
def test_a_killed_run_goes_on_to_the_last_bit_and_exports_what_it_should(
    world: World, tmp_path: Path, kind: str
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "killed"
    knobs = (
        *(f"model.quantization={kind}", "train.precision=bf16", "train.steps=3"),
        *("checkpoint.every=1", "train.optimizer.lr=1e-2", "export.formats=[diffusers, merged]"),
    )
    world.train(whole, *knobs).succeeded()
    assert KILLED in world.train(run, *knobs, failpoint="train.step@3:kill").codes
    other = world.train(run, *knobs, "model.quantization=null")
    other.refused(5, "model.quantization")
    told = world.train(run, *knobs).succeeded().text
    assert f"{kind}: " in told and "policy and reference share it" in told
    assert losses(run) == losses(whole)
    assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert len(set(losses(run))) == 3
    assert "quantization" in read_stamp(run)["parts"]

    # Merged is the base of the files, and the adapter; adapters alone are as they always are.
    lora = load_file(run / "lora" / "adapter_model.safetensors")
    layers = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in lora}
    base, merged = denoiser_weights(world.folder / "sd"), exported_unet(run)
    assert base.keys() == merged.keys()
    for name, weight in base.items():
        change = torch.zeros(())
        if (layer := name.removesuffix(".weight")) in layers:
            down, up = (lora[f"base_model.model.{layer}.lora_{side}.weight"] for side in "AB")
            change = (up.double() @ down.double()).float()
            assert change.any()
        torch.testing.assert_close(merged[name], weight + change, msg=name)

    overrides = [f"run_dir={run}", f"data.path={world.shards}", *knobs]
    world.server.run("compare", world.recipe, overrides).succeeded()
    results = json.loads((run / "compare" / "results.json").read_text())
    for prompt_set in results["prompt_sets"]:
        for scorer in prompt_set["scorers"]:
            assert scorer["base_scores"] != scorer["tuned_scores"]


@pytest.mark.long
@pytest.mark.parametrize("kind", [here(kind) for kind in LIBRARIES])
def test_each_stage_on_two_ranks_takes_the_steps_of_one_rank(
    world: World, tmp_path: Path, kind: str
) -> None:
    """Stage 3 divides what trains; the base is whole on every rank, as told in the plan."""
    knobs = (f"model.quantization={kind}", "train.steps=4", *CALM)
    world.train(tmp_path / "alone", *knobs).succeeded()
    expected = losses(tmp_path / "alone")
    assert max(abs(loss - math.log(2)) for loss in expected) > 1e-4
    for stage in (1, 2, 3):
        run = tmp_path / f"stage{stage}"
        world.train(run, *knobs, ranks=2, zero=stage).succeeded()
        assert losses(run) == pytest.approx(expected, abs=1e-5)
    # Another stage, on another number of ranks, goes on from there.
    more = (*knobs, "train.steps=5")
    world.train(tmp_path / "stage3", *more, zero=1).succeeded()
    world.train(tmp_path / "alone", *more).succeeded()
    assert losses(tmp_path / "stage3") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)
