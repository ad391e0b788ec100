import json
from pathlib import Path

import pytest
from cdpo.engine.basics.errors import RecipeError
from cdpo.engine.recipe import Recipe
from cdpo.engine.training.deepspeed_config import BatchPlan, build_deepspeed_config, plan_batches
from refusals import refused

ROOT = Path(__file__).parents[3]
ZERO2 = {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("objective", "reference_ema", 0.9),
        ("speed", "compile", "regional"),
        ("speed", "frozen_cache", 4),
    ],
)
def test_what_needs_whole_weights_is_not_for_zero_3(build, section, key, value):
    build({"zero_optimization": {"stage": 1}}, **{section: {key: value}})
    with refused(RecipeError, "contradiction", "deepspeed") as told:
        build({"zero_optimization": {"stage": 3}}, **{section: {key: value}})
    assert f"{section}.{key}={value}" in str(told.value)


@pytest.fixture
def build(tmp_path):
    """The config built from a JSON value (or text) and sections of a recipe."""

    def build(content: object = None, world_size: int = 1, **sections: object) -> dict:
        path = tmp_path / "ds.json"
        if isinstance(content, dict | None):
            content = ZERO2 | (content or {})
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text, encoding="utf-8")
        return build_deepspeed_config(recipe(deepspeed=str(path), **sections), world_size, "run")

    return build


def recipe(**sections: object) -> Recipe:
    return Recipe.model_validate(
        {
            "run_dir": "run",
            "model": {"path": "m"},
            "prompts": {"train": "p"},
            "reward": {"path": "r"},
            **sections,
        }
    )


def problems(build, kind: str, *args: object, **kwargs: object) -> list[str]:
    with refused(RecipeError, kind, "deepspeed") as caught:
        build(*args, **kwargs)
    return str(caught.value).splitlines()


# --------------------------------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize(
    ("world_size", "micro", "plan"),
    [
        (1, 4, BatchPlan(32, 4, 8)),
        (1, 32, BatchPlan(32, 32, 1)),
        (2, 4, BatchPlan(16, 4, 4)),
        (8, 1, BatchPlan(4, 1, 4)),
    ],
)
def test_a_global_batch_is_divided_over_ranks_and_forwards(build, world_size, micro, plan):
    train = {"global_batch": 32, "micro_batch": micro}
    assert plan_batches(recipe(train=train), world_size) == plan
    config = build(world_size=world_size, train=train)
    assert config["train_batch_size"] == 32
    assert config["train_micro_batch_size_per_gpu"] == plan.micro_batch
    assert config["gradient_accumulation_steps"] == plan.accumulation


def test_ranks_that_do_not_divide_the_lanes_get_a_line_of_their_own():
    with refused(RecipeError, "mismatch", "data.lanes") as told:
        plan_batches(recipe(data={"lanes": 4}), 3)
    assert "start 1, 2 or 4 ranks" in str(told.value)


def test_a_micro_batch_that_does_not_fit_names_those_that_do():
    with refused(RecipeError, "mismatch", "train.micro_batch") as told:
        plan_batches(recipe(train={"global_batch": 24, "micro_batch": 5}, data={"lanes": 4}), 2)
    assert str(told.value).endswith("use train.micro_batch=1, 2, 3, 4, 6 or 12")


# --------------------------------------------------------------------------------------------------
# Filling in


def test_what_the_recipe_decides_is_filled_in(build):
    config = build(train={"gradient_clip": 0.5})
    assert config["zero_optimization"] == {"stage": 2}
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"] == {"enabled": True}
    assert config["fp16"] == {"enabled": False}
    assert config["zero_allow_untested_optimizer"] is True
    assert config["zero_force_ds_cpu_optimizer"] is False
    assert config["steps_per_print"] > 10**9
    assert config["wall_clock_breakdown"] is False
    assert config["timers"] == {"throughput": {"enabled": False}}


def test_nothing_overlaps_with_communication_that_is_not(build):
    """Nor is a meter of throughput turned off that somebody asks for."""
    asked = {"timers": {"throughput": {"enabled": True}}}
    config = build(asked | {"zero_optimization": {"stage": 2, "overlap_comm": True}})
    assert config["zero_optimization"]["overlap_comm"] is False
    assert config["timers"] == asked["timers"]
    both = build({"zero_optimization": {"stage": 2, "overlap_comm": True}}, world_size=2)
    assert both["zero_optimization"]["overlap_comm"] is True


def test_auto_counts_as_not_given(build):
    auto = {
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
    }
    config = build(auto, train={"precision": "bf16"})
    assert "auto" not in json.dumps(config)
    assert config["bf16"] == {"enabled": True}
    assert config["train_batch_size"] == 32


def test_fp16_scales_its_loss_dynamically_unless_told_otherwise(build):
    config = build(ZERO2 | {"fp16": {"hysteresis": 4}}, train={"precision": "fp16"})
    assert config["fp16"] == {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 16,
        "loss_scale_window": 1000,
        "hysteresis": 4,
        "min_loss_scale": 1,
    }


def test_the_old_name_of_bf16_is_understood(build):
    config = build(ZERO2 | {"bfloat16": {"enabled": True}}, train={"precision": "bf16"})
    assert config["bf16"] == {"enabled": True}
    assert "bfloat16" not in config


def test_monitors_write_below_the_run(build):
    config = build(monitor={"tensorboard": True, "csv": True, "wandb_project": "mine"})
    assert config["tensorboard"] == {
        "enabled": True,
        "output_path": "run",
        "job_name": "tensorboard",
    }
    assert config["csv_monitor"] == {"enabled": True, "output_path": "run", "job_name": "csv"}
    assert config["wandb"] == {"enabled": True, "project": "mine"}
    silent = build(ZERO2 | {"wandb": {"team": "t"}})
    assert silent["wandb"] == {"team": "t", "enabled": False}


def test_the_files_own_print_settings_stand(build):
    config = build(ZERO2 | {"steps_per_print": 10, "wall_clock_breakdown": True})
    assert config["steps_per_print"] == 10
    assert config["wall_clock_breakdown"] is True


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.stem)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_shipped_files_are_plain_deepspeed_without_noise(path, precision):
    assert "auto" not in path.read_text(encoding="utf-8")
    train = {"precision": precision, "micro_batch": 4}
    config = build_deepspeed_config(recipe(deepspeed=str(path), train=train), 8, "run")
    assert str(config["zero_optimization"]["stage"]) in path.stem


# --------------------------------------------------------------------------------------------------
# Conflicts


def test_all_conflicts_are_shown_with_both_values_and_both_places(build, tmp_path):
    name = tmp_path / "ds.json"
    lines = problems(
        build,
        "contradiction",
        {
            "train_batch_size": 64,
            "train_micro_batch_size_per_gpu": 8,
            "gradient_accumulation_steps": 8,
            "gradient_clipping": 0.5,
            "fp16": {"enabled": True},
            "tensorboard": {"enabled": True},
            "zero_allow_untested_optimizer": False,
        },
        train={"precision": "bf16", "micro_batch": 4},
    )
    remedy = "make them agree, or take it out of the JSON"
    assert lines[0] == (
        f"{name}: train_batch_size is 64, but the recipe has train.global_batch=32: {remedy}"
    )
    assert f"gradient_clipping is 0.5, but the recipe has train.gradient_clip=1.0: {remedy}" in (
        "\n".join(lines)
    )
    assert [line.split(": ")[1].split(" is ")[0] for line in lines] == [
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_clipping",
        "fp16.enabled",
        "tensorboard.enabled",
        "zero_allow_untested_optimizer",
    ]


def test_equal_values_are_no_conflict(build):
    build({"train_batch_size": 32, "gradient_clipping": 1, "bf16": {"enabled": True}})


@pytest.mark.parametrize(
    ("content", "kind", "expected"),
    [
        ({"optimizer": {"type": "Adam"}}, "contradiction", "train.optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "contradiction", "train.warmup_steps"),
        ({"torch_autocast": {"enabled": True}}, "contradiction", "train.precision"),
        ({"zero_optimisation": {}}, "contradiction", "did you mean 'zero_optimization'?"),
        ({"qqq": 1}, "contradiction", "'qqq'"),
        ({"bf16": True}, "contradiction", "bf16"),
        ({"bf16": {"enabled": 0}}, "contradiction", "bf16.enabled is 0"),
        ({"zero_optimization": {"stage": 7}}, "unsupported", ""),
        ({"zero_optimization": {"stgae": 1}}, "unsupported", ""),
        ({"zero_optimization": 3}, "unsupported", ""),
        ({"communication_data_type": "fp8"}, "unsupported", ""),
    ],
)
def test_sections_that_cannot_work_are_refused(build, tmp_path, content, kind, expected):
    [line] = problems(build, kind, content)
    assert line.startswith(f"{tmp_path / 'ds.json'}: ")
    assert expected in line


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("{", "damaged"),
        ("{}}", "damaged"),
        ('{"fp16": {}, "fp16": {}}', "damaged"),
        ("[1]", "wrong-type"),
        ("[" * 100_000, "damaged"),
        ("\xff", "damaged"),
        (" " * (1 << 18) + "{}", "too-large"),
    ],
)
def test_files_that_are_no_json_object_are_refused(build, tmp_path, text, kind):
    with refused(RecipeError, kind, str(tmp_path / "ds.json")):
        build(text)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ds_configs/zero9.json", "missing"), ("zero9.json", "missing"), ("zero9", "unknown")],
)
def test_a_file_that_is_not_there_is_refused(name, kind):
    with refused(RecipeError, kind, "deepspeed") as told:
        build_deepspeed_config(recipe(deepspeed=name), 1, "run")
    assert name in str(told.value)
    assert ("zero2, zero2_offload" in str(told.value)) == (kind == "unknown")


def test_shipped_files_have_names_and_paths_are_the_users_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero2").write_text("no JSON")
    by_default, by_name, by_path = (
        build_deepspeed_config(recipe(**given), 1, "run")
        for given in ({}, {"deepspeed": "zero2"}, {"deepspeed": "ds_configs/zero2.json"})
    )
    assert by_default == by_name == by_path
    (tmp_path / "zero2.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    own = build_deepspeed_config(recipe(deepspeed="zero2.json"), 1, "run")
    assert own["zero_optimization"] == {"stage": 1}


def test_a_micro_batch_larger_than_the_share_of_a_rank_is_the_whole_share():
    plan = plan_batches(recipe(train={"global_batch": 24, "micro_batch": 24}, data={"lanes": 4}), 2)
    assert (plan.micro_batch, plan.accumulation) == (12, 1)


@pytest.mark.parametrize("zero", [{"stage": 0}, {}])
def test_a_zero_stage_is_wanted(build, zero):
    assert "1, 2 or 3" in problems(build, "unsupported", {"zero_optimization": zero})[0]


def test_checks_for_non_finite_steps_cannot_be_turned_off(build):
    off = {"zero_optimization": {"stage": 2, "compute_grad_norm": False}}
    assert "compute_grad_norm" in problems(build, "contradiction", off)[0]


def test_averages_need_the_optimiser_in_one_place(build):
    def zero(**offload: object) -> dict:
        return {"zero_optimization": {"stage": 3, "offload_optimizer": offload}}

    [line] = problems(build, "contradiction", zero(device="cpu", ratio=0.5), adapter={"ema": 0.9})
    assert "needs the optimiser's states in one place" in line and "adapter.ema=0.9" in line
    build(zero(device="cpu"), adapter={"ema": 0.9})


def test_an_optimiser_on_a_disk_would_not_resume(build):
    offload = {"device": "nvme", "nvme_path": "/disk"}
    nvme = {"zero_optimization": {"stage": 3, "offload_optimizer": offload}}
    [line] = problems(build, "contradiction", nvme)
    assert "untrained weights; use cpu" in line
    build({"zero_optimization": {"stage": 3, "offload_param": offload}})
