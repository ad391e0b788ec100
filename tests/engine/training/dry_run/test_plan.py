"""The plan of a run: counts against independent sums, operations against published figures."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from cdpo.engine.basics.errors import OutsideError, RecipeError
from cdpo.engine.display.terminal import Terminal
from cdpo.engine.models import Conditioning, family_of
from cdpo.engine.recipe import Model, Recipe
from cdpo.engine.recipe.reading import load_recipe
from cdpo.engine.training.dry_run import plan as plan_module
from cdpo.engine.training.dry_run.networks import (
    SavedTensors,
    activation_bytes,
    count_flops,
    read_meta_model,
    training_flops,
)
from cdpo.engine.training.dry_run.plan import Plan, flops_text, make_plan, print_plan
from cdpo.kernels.fuse import fuse
from diffusers import QwenImage21Transformer2DModel, UNet2DConditionModel
from huggingface_hub import constants
from launching import PAIRS_REPEAT, World, told_of_repeats
from refusals import refused
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).parents[4]
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
EMOJI = 4_283_012  # parameters of the small denoiser
CPU = torch.device("cpu")


def sd15(*overrides: str) -> Recipe:
    """The recipe of Stable Diffusion 1.5, of which the configs are shipped."""
    own = ("train.precision=bf16", "train.micro_batch=4", *overrides)
    return load_recipe(ROOT / "recipes" / "sd15_cdpo.yaml", own)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(sd15(), 1, CPU)


@pytest.fixture(scope="module")
def checkpointed() -> Plan:
    return make_plan(sd15("speed.activation_checkpointing=true", "speed.encoders=offload"), 1, CPU)


def test_units_of_a_pair_are_counted_with_adapters_and_checkpoints(
    plan: Plan, checkpointed: Plan
) -> None:
    """Twice the training pass of one image, 2.1 and 2.85 units, and two frozen passes."""
    assert plan.units_per_pair == pytest.approx(2 * 2.1 + 2, rel=0.03)
    assert checkpointed.units_per_pair == pytest.approx(2 * 2.85 + 2, rel=0.03)


def emoji(kind: str, *overrides: str) -> Plan:
    """The plan of a recipe with the small model."""
    paths = ["model.path=assets/emoji/sd", *overrides]
    return make_plan(load_recipe(ROOT / "recipes" / f"{kind}.yaml", paths), 1, CPU)


def device_bytes(plan: Plan) -> dict[str, int]:
    return {row.name: row.device for row in plan.memory}


def test_a_sequence_whose_layout_the_network_reads_is_counted_without_values(
    tmp_path: Path,
) -> None:
    """Qwen-Image 2.1: as many operations as with values, forward and backward, with checkpoints
    or without.
    """
    tiny.qwen_image21_pipeline().save_pretrained(tmp_path)
    size = (128, 192)
    spec = Model(backbone="qwen_image21", path=str(tmp_path), resolution=size)
    model = read_meta_model(spec, torch.float32)
    real = QwenImage21Transformer2DModel.from_pretrained(tmp_path, subfolder="transformer")
    ask, told = family_of(spec).ask, Conditioning(torch.ones(1, 512, 24))
    latents, times = torch.ones(1, *model.latent_shape(size)), torch.ones(1)

    def counted() -> int:
        with sdpa_kernel(SDPBackend.MATH):  # as on the meta device: others have no count on a CPU
            return count_flops(lambda: ask(real, latents, times, told).sum().backward())

    policy = model.denoiser.requires_grad_(True)
    assert training_flops(model, policy, size) == counted()
    assert activation_bytes(model, policy, 2, size, checkpointing=False) > 0
    real.enable_gradient_checkpointing()
    policy.enable_gradient_checkpointing()
    assert training_flops(model, policy, size) == counted()


def test_full_fine_tuning_has_a_second_copy_of_the_weights() -> None:
    full = ("adapter.type=full", "export.formats=[merged]", "adapter.ema=0.999")
    plan = emoji("emoji_cdpo", *full)
    assert plan.units_per_pair == pytest.approx(2 * 3.0 + 2, rel=0.03)
    assert plan.networks["denoiser"] == (EMOJI, EMOJI)
    rows = device_bytes(plan)
    assert rows["reference"] == rows["policy weights"] == 4 * EMOJI
    assert rows["AdamW, float32 weights"] == 12 * EMOJI
    assert rows["moving average"] == 4 * EMOJI


def test_an_lcm_of_lora_weights_has_a_teacher_of_the_same_size() -> None:
    lora = "model.lcm_lora=latent-consistency/lcm-lora-sdv1-5"
    plan = emoji("lcm_cdpo", "model.unet=null", lora, "model.resolution=[32,32]")
    assert plan.frozen_passes == 8
    assert device_bytes(plan)["teacher"] == 2 * EMOJI


def test_parts_of_their_own_are_read_and_refused_as_in_training() -> None:
    """A denoiser also from a whole pipeline; one of another class is named."""
    whole = emoji("emoji_cdpo", "model.unet=assets/emoji/sd", "model.vae=assets/emoji/sd/vae")
    assert whole.networks == emoji("emoji_cdpo").networks
    for key, other in (("model.unet", "sd3/transformer"), ("model.vae", "sd/unet")):
        with refused(OutsideError, "unreadable", key) as told:
            emoji("emoji_cdpo", f"{key}=assets/emoji/{other}")
        assert "it holds a " in str(told.value)


def test_a_consistency_baseline_takes_the_winner_through_three_networks() -> None:
    baseline = ("objective.type=consistency_sft", "objective.loser_safeguard=null")
    unet = "model.unet=assets/emoji/lcm"
    image = ("objective.target=image",)
    dpo, sft, bare = (emoji("emoji_lcm_cdpo", unet, *more) for more in ((), baseline, image))
    assert sft.units_per_pair == pytest.approx((dpo.units_per_pair - 8) / 2 + 3)
    teachers = [device_bytes(plan)["teacher"] for plan in (dpo, sft)]
    assert teachers[0] == teachers[1] > 0
    # The pair's own latents as target: 12.2 and 6.2 units where a policy's image takes 2.1.
    assert bare.units_per_pair == pytest.approx(dpo.units_per_pair - 6)
    assert bare.frozen_passes == 2 and "teacher" not in device_bytes(bare)


def test_checkpoints_leave_a_quarter_of_the_activations(plan: Plan, checkpointed: Plan) -> None:
    whole, kept = (device_bytes(some)["activations"] for some in (plan, checkpointed))
    assert 0.2 < kept / whole < 0.3


def test_activations_grow_with_the_batch_and_shrink_with_fused_kernels() -> None:
    spec = Model(path=str(ROOT / "assets" / "emoji" / "sd"))

    def activations(num_images: int, fused: bool = False) -> int:
        model = read_meta_model(spec, torch.float32)
        policy = model.denoiser.requires_grad_(True).train()
        if fused:
            fuse(policy)
        return activation_bytes(model, policy, num_images, (32, 32), checkpointing=False)

    one = activations(1)
    assert activations(4) == 4 * one
    assert activations(1, fused=True) < 0.9 * one


def test_the_estimate_is_what_autograd_keeps_of_a_real_forward_pass() -> None:
    """On a CPU, whose attention saves no scores either."""
    spec = Model(path=str(ROOT / "assets" / "emoji" / "sd"))
    model = read_meta_model(spec, torch.float32)
    noisy, timesteps, told = model.inputs(2, (32, 32))
    noisy, timesteps, text = (
        torch.zeros_like(x, device=CPU) for x in (noisy, timesteps, told.text)
    )
    unet = UNet2DConditionModel.from_config(model.denoiser.config)
    saved = SavedTensors({weight.untyped_storage()._cdata for weight in unet.parameters()})
    with saved:
        family_of(spec).ask(unet, noisy, timesteps, Conditioning(text))
    policy = model.denoiser.requires_grad_(True)
    estimate = activation_bytes(model, policy, 2, (32, 32), checkpointing=False)
    assert estimate == pytest.approx(saved.bytes, rel=0.02)


def test_saved_tensors_counts_a_storage_once_and_no_weights() -> None:
    """x is saved by both products, the weight by neither count; relu saves its own output."""
    x = torch.ones(4, 8, requires_grad=True)
    weight = torch.nn.Parameter(torch.ones(8, 8))
    saved = SavedTensors({weight.untyped_storage()._cdata})
    with saved:
        hidden = x @ weight
        total = (hidden.relu() + x @ weight).sum()
    assert saved.bytes == 4 * 8 * 4 + 4 * 8 * 4
    total.backward()


def test_latents_and_ranks_that_do_not_fit_are_refused_as_in_training(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    with refused(RecipeError, "mismatch", "data.lanes"):
        make_plan(tiny_recipe(), 3, CPU)
    config = tiny_recipe("speed.compile=regional", "deepspeed=zero3")
    with refused(RecipeError, "contradiction", "deepspeed"):
        make_plan(config, 1, CPU)


def test_a_model_that_is_nowhere_is_named(tiny_recipe: Callable[..., Recipe]) -> None:
    with refused(OutsideError, "unreachable", "model.path"):
        make_plan(tiny_recipe("model.path=nobody/nothing"), 1, CPU)


def test_configs_of_the_hubs_cache_and_of_a_revision_come_before_shipped_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert read_meta_model(Model(path=SD15), torch.float32).shipped == (SD15,)
    with refused(OutsideError, "unreachable", "model.path"):
        read_meta_model(Model(path=SD15, revision="0123456"), torch.float32)
    repository, snapshot = tmp_path / f"models--{SD15.replace('/', '--')}", "0" * 40
    shutil.copytree(ROOT / "assets" / "emoji" / "sd", repository / "snapshots" / snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot)
    model = read_meta_model(Model(path=SD15), torch.float32)
    assert model.shipped == () and model.denoiser.config["sample_size"] == 8


def test_tables_fit_eighty_columns(monkeypatch, checkpointed: Plan) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(plan_module, "make_plan", lambda *_: checkpointed)
    text = io.StringIO()
    print_plan(sd15(), 2, Terminal(stdout=text))
    lines = text.getvalue().splitlines()
    tables = lines[lines.index("networks") :]
    assert all(len(line) <= 80 for line in tables)
    assert not any("…" in line for line in tables)
    assert any("859,520,964" in line for line in tables)
    assert any(line.startswith("total") for line in tables)
    assert "computed, not measured" in lines[0]


@pytest.mark.parametrize(
    ("flops", "text"),
    [(6.761e12, "6.761 TFLOP"), (2e15, "2.000 PFLOP"), (208e6, "208.000 MFLOP")],
)
def test_operations_are_written_with_a_prefix(flops: float, text: str) -> None:
    assert flops_text(flops) == text


def test_the_verb_prints_the_plan_and_leaves_nothing_behind(world: World, tmp_path: Path) -> None:
    """Of shards that are there it says what the head of the run will (test_trainer.py)."""
    run = tmp_path / "run"
    knobs = [f"run_dir={run}", f"data.path={world.shards}", *PAIRS_REPEAT]
    outcome = world.server.run(
        "train", world.recipe, ["--dry-run", "--world-size", "2", *knobs]
    ).succeeded()
    assert "memory of each rank" in outcome.text and "ranks  2" in outcome.text
    told_of_repeats(outcome)
    assert not run.exists()


def test_text_encoders_that_are_not_loaded_are_not_counted() -> None:
    plan, stored = emoji("emoji_cdpo"), emoji("emoji_cdpo", "data.text=stored")
    without = [row for row in plan.memory if row.name != "text encoders"]
    assert stored.memory == without and len(without) == len(plan.memory) - 1
    assert plan.networks.keys() - stored.networks.keys() == {"text_encoder"}
