"""Runs whose numbers are not finite: how they end, and how they go on."""

from __future__ import annotations

import json
import re
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cdpo.engine.basics.errors import NumericsError
from cdpo.engine.training.checkpoint.files import seal
from cdpo.engine.training.exports import Exports
from launching import KILLED, World, losses, metrics
from refusals import refused
from safetensors.torch import save_file

INF = float("inf")
UNET = SimpleNamespace(denoiser_name="unet")


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-????????"))


def test_the_advice_of_a_run_that_ended_by_numerics_works(world: World, tmp_path: Path) -> None:
    """In the same folder, by what the message says; without it the run is held to be stuck, once
    it has died there three times. What has changed is told wherever the run is.
    """
    run, mine = tmp_path / "run", ("train.max_skipped=2", "checkpoint.keep=1")
    outcome = world.train(run, *mine, failpoint="train.loss@5+:nan")
    outcome.refused(4, "2 batches", "step 2")
    told = " ".join(outcome.output[0].split())
    [advice] = re.findall(r"`(--allow-change [^`]+)`", told)
    assert advice == "--allow-change train.optimizer.lr train.optimizer.lr=0.0001"

    starts = run / "starts.log"
    assert starts.read_text().splitlines()[-1] == "step 3"
    starts.write_text(starts.read_text() * 3)
    world.train(run, *mine).refused(7, "step 3", "--allow-change", str(starts))

    others = {"train.optimizer.weight_decay": 0.125, "train.gradient_clip": 0.5}
    more = [part for k, v in others.items() for part in ("--allow-change", k, f"{k}={v}")]
    said = world.train(run, *mine, *advice.split(), *more).succeeded().text
    change = "after step 2: train.optimizer.lr 0.001 -> 0.0001"
    assert f"changed {change}" in said
    assert [row["lr"] for row in metrics(run)] == [1e-3] * 2 + [1e-4] * 4
    assert f"# Changed {change}\n" in (run / "recipe.yaml").read_text()
    manifest = json.loads((newest(run) / "MANIFEST.json").read_text())
    exported = json.loads((run / "exported.json").read_text())
    assert exported["changes"] == manifest["changes"]
    first = {"step": 2, "key": "train.optimizer.lr", "before": "0.001", "after": "0.0001"}
    assert first in manifest["changes"] and len(manifest["changes"]) == 3
    # Settings that DeepSpeed keeps beside the state, and would have taken from there.
    [file] = (newest(run) / "deepspeed").glob("*optim_states.pt")
    state = torch.load(file, weights_only=False)["optimizer_state_dict"]
    [group] = state["base_optimizer_state"]["param_groups"]
    assert (group["weight_decay"], state["clip_grad"]) == (0.125, 0.5)
    assert not starts.exists()


def poison(checkpoint: Path, state: str) -> None:
    """Make a number of Adam's state infinite, in a file whose checksum is in order."""
    [path] = (checkpoint / "deepspeed").glob("*optim_states.pt")
    content = torch.load(path, weights_only=False)
    saved = content["optimizer_state_dict"]
    states = saved.get("base_optimizer_state") or saved["optimizer_state_dict"]
    states["state"][0][state][5] = INF
    torch.save(content, path)
    manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    entry = manifest["files"][str(path.relative_to(checkpoint))]
    entry.update(bytes=path.stat().st_size, sha256=sha256(path.read_bytes()).hexdigest())
    (checkpoint / "MANIFEST.json").write_text(json.dumps(seal(manifest)))


@pytest.mark.parametrize(
    ("zero", "state", "named"),
    [
        pytest.param(1, "exp_avg", "first moment of Adam", marks=pytest.mark.long),
        (2, "exp_avg_sq", "second moment of Adam"),
        pytest.param(3, "ema", "moving average", marks=pytest.mark.long),
    ],
)
def test_a_checkpoint_that_is_not_finite_is_passed_over(
    world: World, tmp_path: Path, zero: int, state: str, named: str
) -> None:
    average = ("adapter.ema=0.5", "train.steps=4")
    world.train(tmp_path, *average, zero=zero).succeeded()
    before = losses(tmp_path)
    poison(newest(tmp_path), state)
    said = " ".join(world.train(tmp_path, *average, zero=zero).succeeded().text.split())
    assert re.search(rf"step-00000004: {named} of policy\.\S+ is not finite \(inf\)", said)
    assert "passed over" in said and "nothing to do" not in said
    assert losses(tmp_path) == before


def test_weights_that_overflow_in_the_adapter_end_the_run(world: World, tmp_path: Path) -> None:
    """Finite as they are trained, and not with the scale that is in the numbers of exports."""
    hot = ("train.steps=1", "train.optimizer.lr=1e37", "adapter.alpha=1000")
    outcome = world.train(tmp_path, *hot)
    outcome.refused(4, "lora_B.weight in pytorch_lora_weights.safetensors", "--allow-change")
    assert not list(tmp_path.glob("checkpoints/step-*")) and not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    "file",
    [
        "lora/pytorch_lora_weights.safetensors",
        "lora/kohya.safetensors",
        "lora_with_lcm/adapter_model.safetensors",
        "kohya/lora.safetensors",
        "merged/unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "ema/merged/unet/diffusion_pytorch_model.safetensors",
        "ema/lora/pytorch_lora_weights.safetensors",
    ],
)
def test_no_export_appears_that_is_not_finite(tmp_path: Path, file: str) -> None:
    """None of them: the parts that are copied from the base are the base's own."""
    run = SimpleNamespace(recipe=SimpleNamespace(train=SimpleNamespace()), backbone=UNET)
    run.recipe.train.optimizer = SimpleNamespace(lr=1e-3)
    made, checkpoint = tmp_path / "exported.tmp", tmp_path / "checkpoints" / "step-00000006"
    for name in ("lora/good.safetensors", "merged/vae/model.safetensors", file):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        number = 1.0 if "good" in name else INF
        save_file({"weight": torch.tensor([1.0, number])}, made / name)
    with refused(NumericsError, "non-finite", file):
        Exports._refuse_non_finite(run, made, checkpoint)
    assert not made.exists()


def test_copies_of_the_base_are_as_they_are_there(tmp_path: Path) -> None:
    path = tmp_path / "merged" / "text_encoder" / "model.safetensors"
    path.parent.mkdir(parents=True)
    save_file({"mask": torch.tensor([-INF])}, path)
    Exports._refuse_non_finite(SimpleNamespace(backbone=UNET), tmp_path, tmp_path)
    assert path.exists()


@pytest.mark.long
def test_killed_three_times_at_one_step(world: World, tmp_path: Path) -> None:
    """By SIGKILL, whose death leaves no word; what it came to is known all the same."""
    for _ in range(3):
        assert world.train(tmp_path, failpoint="train.loss@3:kill").code == KILLED
    world.train(tmp_path).refused(7, "died 3 times at step 2", "train.micro_batch")
    world.train(tmp_path, "train.micro_batch=2").succeeded()
