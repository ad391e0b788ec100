"""Whatever a user gets wrong: one clear line, the contract's exit code, nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from launching import ForkServer, World
from safetensors.torch import load_file, save_file


def test_missing_recipe(server: ForkServer, tmp_path: Path) -> None:
    for verb in ("prepare", "train", "compare"):
        server.run(verb, tmp_path / "none.yaml").refused(2, "none.yaml")


@pytest.mark.parametrize(
    ("override", "texts"),
    [
        ("train.stpes=3", ["train.stpes", "train.steps"]),
        ("train.steps=many", ["train.steps", "'many'"]),
        ("train.steps", ["train.steps"]),
        ("data.lanes=3", ["global_batch", "lanes"]),
        ("train.micro_batch=3", ["train.micro_batch=3"]),
        ("model.backbone=lcm", ["lcm", "consistency_dpo"]),
        (
            "model.backbone=lcm objective.type=consistency_dpo",
            ["model.teacher", "model.unet", "model.lcm_lora"],
        ),
        ("objective.target=image", ["target=image", "diffusion_dpo", "consistency_dpo"]),
        ("adapter.targets=[to_qq]", ["to_qq", "to_q"]),
    ],
)
def test_mistyped_recipes(world: World, tmp_path: Path, override: str, texts: list[str]) -> None:
    world.train(tmp_path / "run", *override.split()).refused(2, *texts)


def test_a_conflict_with_the_deepspeed_file_shows_both_values(world: World, tmp_path: Path) -> None:
    path = tmp_path / "conflict.json"
    path.write_text('{"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5}')
    outcome = world.train(tmp_path / "run", f"deepspeed={path}")
    outcome.refused(2, "conflict.json", "0.5", "train.gradient_clip=1.0")


@pytest.mark.parametrize(
    ("override", "code", "texts"),
    [
        ("prompts.train=nowhere.txt", 3, ["nowhere.txt"]),
        ("model.path=nowhere", 6, ["model.path=nowhere"]),
        ("model.unet=nowhere", 6, ["model.unet=nowhere"]),
        ("model.backbone=sdxl", 6, ["model.backbone=sd"]),
        ("reward.path=nowhere", 6, ["nowhere"]),
        ("model.resolution=[20, 16]", 6, ["model.resolution=20x16"]),
        ("data.lanes=8 data.pairs_per_shard=1 curriculum.tiers=5", 3, ["tier"]),
        ("curriculum.min_score_gap=100", 3, ["min_score_gap=100"]),
    ],
)
def test_prepare_refuses(
    world: World, tmp_path: Path, override: str, code: int, texts: list[str]
) -> None:
    run = tmp_path / "run"
    overrides = override.replace(", ", ",").split()
    outcome = world.server.run("prepare", world.recipe, [f"run_dir={run}", *overrides])
    outcome.refused(code, *texts)
    assert not (run / "shards" / "manifest.json").exists()


@pytest.mark.parametrize("misfit", ["vae", "text_encoder"])
def test_a_model_that_does_not_fit_leaves_nothing_half_written(
    world: World, tmp_path: Path, misfit: str
) -> None:
    """What fits what, and what is said of it, is in engine/models/test_checks.py."""
    run, model = tmp_path / "run", Path(shutil.copytree(world.folder / "sd", tmp_path / "sd"))
    if misfit == "vae":
        tiny.vae(latent_channels=8).save_pretrained(model / "vae")
        texts = ["in_channels=4, latent_channels=8"]
    else:
        weights = model / "text_encoder" / "model.safetensors"
        state = {name: value for name, value in load_file(weights).items() if "fc1" not in name}
        save_file(state, weights, metadata={"format": "pt"})
        texts = ["/sd", "text_encoder", "mlp.fc1.bias", "mlp.fc1.weight"]
    overrides = [f"run_dir={run}", f"model.path={model}"]
    world.server.run("prepare", world.recipe, overrides).refused(6, *texts)
    assert not (run / "shards").exists() and not (run / "candidates").exists()


def overflowing_vae(world: World, folder: Path, layer: str) -> Path:
    """A VAE stored in fp16 with one weight that is infinite there."""
    shutil.copytree(world.folder / "sd" / "vae", folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state[layer][0, 0, 0, 0] = 7e4
    save_file({name: value.half() for name, value in state.items()}, weights)
    return folder


@pytest.mark.parametrize(
    ("layer", "code"),
    [
        # Its images would be black and all tie: the error names what to change instead.
        ("decoder.conv_in.weight", 4),
        # Its images are as they should be, its latents are not: no shard may hold them.
        ("encoder.conv_out.weight", 3),
    ],
)
def test_a_vae_that_overflows_is_found_at_prepare(
    world: World, tmp_path: Path, layer: str, code: int
) -> None:
    vae, run = overflowing_vae(world, tmp_path / "vae", layer), tmp_path / "run"
    outcome = world.server.run("prepare", world.recipe, [f"run_dir={run}", f"model.vae={vae}"])
    outcome.refused(code, "model.vae")
    assert not (run / "shards" / "manifest.json").exists()


def test_train_without_shards_and_compare_without_an_adapter(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for verb in ("train", "compare"):
        world.server.run(verb, world.recipe, [f"run_dir={run}"]).refused(3, str(run))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


@pytest.mark.parametrize("damage", [Path.unlink, truncate], ids=["missing", "truncated"])
def test_damaged_shards_are_named(
    world: World, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(world.shards, folder)
    first = json.loads((folder / "manifest.json").read_text())["shards"][0]["name"]
    damage(folder / first)
    outcome = world.train(tmp_path / "run", f"data.path={folder}")
    outcome.refused(3, first)
    assert not (tmp_path / "run" / "checkpoints").exists() or not list(
        (tmp_path / "run" / "checkpoints").glob("step-*")
    )


def test_two_runs_in_one_folder_are_refused(world: World, tmp_path: Path) -> None:
    import fcntl

    run = tmp_path / "run"
    run.mkdir()
    with open(run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        world.train(run).refused(2, str(run))
    world.train(run, "train.steps=1").succeeded()


@pytest.mark.slow
def test_every_rank_leaves_with_the_same_code(world: World, tmp_path: Path) -> None:
    outcome = world.train(tmp_path / "run", "objective.type=consistency_dpo", ranks=2)
    assert outcome.codes == [2, 2], outcome.text
