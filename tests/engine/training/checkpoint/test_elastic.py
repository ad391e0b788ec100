"""A run goes on with other ranks or another ZeRO stage: state bit for bit, the curve to rounding.

State is compared after a chain of resumes that take no step: what the last one saves, divided as it
was at first, must be DeepSpeed's own files of the first, to the last bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import CALM, ROOT, Outcome, World, losses, make_world, zero_config
from safetensors.torch import load_file
from torch import Tensor

RESUME_AND_SAVE = ROOT / "tests" / "workers" / "resume_and_save.py"
LORA = ("adapter.ema=0.8", "train.steps=4")
FULL = (*LORA, "adapter.type=full", "export.formats=[merged]")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, server: Any) -> World:
    """The tiny world with four lanes, for one, two or four ranks."""
    return make_world(tmp_path_factory.mktemp("lanes"), server, data__lanes=4)


def config(world: World, zero: int) -> Path:
    """Stage 3 divides all but the smallest parameters, and keeps them in several flat tensors."""
    divided = {"stage3_param_persistence_threshold": 100, "sub_group_size": 5000}
    return zero_config(world.folder / f"elastic_zero{zero}.json", zero, **divided)


def start(world: World, run: Path, ranks: int, zero: int, *overrides: str, **more: Any) -> Outcome:
    mine = [f"run_dir={run}", f"data.path={world.shards}", f"deepspeed={config(world, zero)}"]
    verb = more.pop("verb", "train")
    more.setdefault("seconds", 400)  # four ranks on two cores, beside other tests
    return world.server.run(verb, world.recipe, [*mine, *overrides], ranks=ranks, **more)


def resume_and_save(world: World, source: Path, into: Path, ranks: int, zero: int, *o: str) -> str:
    """Resume from ``source``'s checkpoints and save into ``into``'s."""
    into.mkdir()
    (into / "checkpoints").symlink_to(source / "checkpoints")
    env = {"SAVE_INTO": str(into / "saved")}
    text = start(world, into, ranks, zero, *o, verb=RESUME_AND_SAVE, env=env).succeeded().text
    (into / "checkpoints").unlink()
    (into / "saved").rename(into / "checkpoints")
    return text


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-????????"))


def partition(run: Path) -> dict[str, Any]:
    """The tensors and numbers in the one partition of a run of one rank."""
    (path,) = (newest(run) / "deepspeed").glob("*optim_states.pt")
    content = torch.load(path, weights_only=False)["optimizer_state_dict"]
    names = {"single_partition_of_fp32_groups", "base_optimizer_state", "fp32_flat_groups"}
    kept = {name: content[name] for name in (*names, "optimizer_state_dict") if name in content}
    return {"scaler": vars(content["loss_scaler"]), **kept}


def differences(one: Any, other: Any, at: str = "") -> list[str]:
    """Where two nests of containers and tensors differ in a bit."""
    if isinstance(one, Tensor):
        return [] if torch.equal(one, other) else [at]
    if isinstance(one, dict):
        keys = one.keys() | other.keys()
        return [d for k in keys for d in differences(one.get(k), other.get(k), f"{at}.{k}")]
    if isinstance(one, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{at}[{i}]")]
    return [] if one == other else [f"{at}: {one} {other}"]


# Half precision is slow on CPUs: one step, for which fp16 also searches its loss scale.
CHAINS = {
    "lora-fp16": ((*LORA, "train.precision=fp16", "train.steps=1"), [(1, 1), (2, 3), (1, 1)]),
    "full-bf16": ((*FULL, "train.precision=bf16", "train.steps=1"), [(1, 3), (4, 1), (1, 3)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("lora-fp16", marks=pytest.mark.long), "full-bf16"])
def test_a_chain_of_resumes_loses_no_bit(world: World, tmp_path: Path, name: str) -> None:
    overrides, chain = CHAINS[name]
    runs = [tmp_path / f"{i}-{ranks}-{zero}" for i, (ranks, zero) in enumerate(chain)]
    start(world, runs[0], *chain[0], *overrides).succeeded()
    for before, run, (ranks, zero) in zip(runs, runs[1:], chain[1:], strict=False):
        text = resume_and_save(world, before, run, ranks, zero, *overrides)
        assert f"divided anew for {ranks} x ZeRO-{zero}" in text
        assert adapters(run) == adapters(runs[0])
    first, last = partition(runs[0]), partition(runs[-1])
    assert differences(first, last) == []
    states = first.get("base_optimizer_state") or first["optimizer_state_dict"]
    assert {"exp_avg", "exp_avg_sq", "ema", "step"} <= states["state"][0].keys()


def adapters(run: Path) -> dict[str, list[float]]:
    """LoRA and its average as a checkpoint holds them, gathered by DeepSpeed."""
    paths = [
        newest(run) / kind / "lora" / "pytorch_lora_weights.safetensors" for kind in ("", "ema")
    ]
    return {
        f"{path.parent.parent.name}/{name}": value.flatten().tolist()
        for path in paths
        if path.exists()
        for name, value in load_file(path).items()
    }


TAME = (*CALM, "train.optimizer.lr=3e-4")


@pytest.mark.slow
def test_the_curve_is_that_of_an_uninterrupted_run(world: World, tmp_path: Path) -> None:
    """To rounding, 1e-5 of a loss of about 0.7, and of a weight: sums over ranks and micro-batches
    are in another order.
    """
    whole, run = tmp_path / "whole", tmp_path / "run"
    start(world, whole, 1, 2, *FULL, *TAME, "train.steps=4").succeeded()
    start(world, run, 1, 1, *FULL, *TAME, "train.steps=2").succeeded()
    start(world, run, 2, 2, *FULL, *TAME, "train.steps=3").succeeded()
    outcome = start(world, run, 1, 3, *FULL, *TAME, "train.steps=4").succeeded()
    assert "step-00000003 was written by 2 x ZeRO-2: divided anew for 1 x ZeRO-3" in outcome.text
    assert losses(run) == pytest.approx(losses(whole), abs=1e-5)
    for ours, theirs in zip(exported(run), exported(whole), strict=True):
        assert max((ours[k] - theirs[k]).abs().max().item() for k in ours | theirs) < 1e-5


def exported(run: Path) -> list[dict[str, Tensor]]:
    """What a run exports, last weights and average."""
    paths = sorted(p for p in run.rglob("*.safetensors") if "checkpoints" not in p.parts)
    assert any("ema" in path.parts for path in paths)
    return [load_file(path) for path in paths]


@pytest.mark.slow
def test_killed_while_dividing(world: World, tmp_path: Path) -> None:
    """The checkpoint is only read: a kill costs nothing, on either side of it."""
    run = tmp_path / "run"
    start(world, run, 2, 3, *LORA, "train.steps=2").succeeded()
    before = (newest(run) / "MANIFEST.json").read_bytes()
    env = {"CDPO_FAILPOINT": "checkpoint.divided@2:kill"}
    assert start(world, run, 1, 1, *LORA, env=env).code == -9
    assert (newest(run) / "MANIFEST.json").read_bytes() == before
    text = start(world, run, 2, 1, *LORA).succeeded().text
    assert "written by 2 x ZeRO-3: divided anew for 2 x ZeRO-1" in text
    assert newest(run).name == "step-00000004"


def test_ranks_that_do_not_divide_the_lanes_are_refused(world: World, tmp_path: Path) -> None:
    start(world, tmp_path / "run", 3, 1, *LORA).refused(2, "data.lanes=4")


def test_a_checkpoint_says_what_made_it_and_is_not_for_another_recipe(
    world: World, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    start(world, run, 1, 1, *LORA, "train.steps=1").succeeded()
    manifest = json.loads((newest(run) / "MANIFEST.json").read_text())
    assert manifest["step"] == 1 and manifest["world_size"] == 1
    assert manifest["code"].keys() >= {"cdpo", "sources", "torch", "deepspeed"}
    # Ranks and stage may change; what decides the numbers may not.
    start(world, run, 1, 3, *LORA, "adapter.rank=4").refused(5, "adapter.rank")
    files = manifest["files"].keys()
    assert "recipe.yaml" in files and "lora/pytorch_lora_weights.safetensors" in files
    assert "deepspeed/zero_pp_rank_0_layout.json" in files
