"""The DeepSpeed configuration of a run: a plain DeepSpeed JSON file, filled in from the recipe.

What the recipe decides (batch sizes, arithmetic, clipping, monitors) is filled in where the JSON is
silent or says ``"auto"``; where both speak and differ, that is an error which shows both values.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..basics.errors import OutsideError, RecipeError, told_by
from ..basics.files import LFS_REMEDY, lfs_pointer
from ..basics.shipped import locate, shipped
from ..recipe import Recipe

# Top-level keys of DeepSpeed 0.19, which ignores all others without a word.
KNOWN_KEYS = frozenset(
    """
    activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger
    communication_data_type compile csv_monitor data_efficiency data_types dataloader_drop_last
    datastates_ckpt disable_allgather disable_python_gc dump_state expert_parallel flops_profiler
    fp16 gradient_accumulation_steps gradient_allreduce_op gradient_clipping
    gradient_predivide_factor hybrid_engine log_level managed_gradient_accumulation
    memory_breakdown optimizer pipeline prescale_gradients scheduler
    seq_parallel_communication_data_type steps_per_print tensor_parallel tensorboard timers
    torch_autocast train_batch_size train_micro_batch_size_per_gpu
    use_data_before_expert_parallelism wall_clock_breakdown wandb weight_quantization
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
    """.split()  # noqa: SIM905 (sixty lines otherwise)
)
KEPT_BY_RECIPE = {
    "optimizer": "the recipe keeps the optimiser in train.optimizer",
    "scheduler": "the recipe keeps the schedule in train.warmup_steps and train.optimizer.lr",
    "torch_autocast": "the recipe keeps the arithmetic in train.precision",
}
# DeepSpeed's dynamic loss scaling, spelled out so that the filled-in file says what runs.
FP16_DEFAULTS = {
    "loss_scale": 0,
    "initial_scale_power": 16,
    "loss_scale_window": 1000,
    "hysteresis": 2,
    "min_loss_scale": 1,
}
# Without these DeepSpeed would take a step on NaN.
NON_FINITE_CHECKS = (("zero_optimization", "compute_grad_norm"), ("bf16", "check_grad_overflow"))
TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
MAX_BYTES = 1 << 18
NEVER = 1 << 62  # steps between DeepSpeed's own prints: the trainer reports instead


@dataclass(frozen=True)
class BatchPlan:
    """How one rank works through its share of a global batch."""

    pairs_per_rank: int
    """Pairs of a global batch that fall to one rank."""
    micro_batch: int
    """Pairs in one forward."""
    accumulation: int
    """Forwards in one optimiser step."""


def plan_batches(recipe: Recipe, world_size: int) -> BatchPlan:
    """Divide the global batch over ranks and forwards, or say which numbers would divide it.

    Of `train.micro_batch: auto` it knows no more than the most, a rank's share in one forward.
    """
    batch, lanes = recipe.train.global_batch, recipe.data.lanes
    if lanes % world_size:
        raise RecipeError(
            f"world size {world_size} does not divide data.lanes={lanes}: "
            f"start {_one_of(divisors(lanes))} ranks, or prepare with other data.lanes",
            "data.lanes",
            "mismatch",
        )
    pairs = batch // world_size  # exact: lanes divide the batch (schema), ranks divide the lanes
    # A rank with fewer pairs than fit in its memory is no mistake: the recipe was made for fewer.
    wanted = recipe.train.micro_batch
    micro = pairs if wanted == "auto" else min(wanted, pairs)
    if pairs % micro:
        raise RecipeError(
            f"train.micro_batch={micro} does not divide the {pairs} pairs of a rank "
            f"(train.global_batch={batch} over {world_size} "
            f"{'ranks' if world_size > 1 else 'rank'}): "
            f"use train.micro_batch={_one_of(divisors(pairs))}",
            "train.micro_batch",
            "mismatch",
        )
    return BatchPlan(pairs, micro, pairs // micro)


def build_deepspeed_config(recipe: Recipe, world_size: int, run_dir: str | Path) -> dict[str, Any]:
    """The dictionary for ``deepspeed.initialize``: the recipe's JSON file, filled in and checked.

    Raises:
        RecipeError: with every conflict between the two files at once.
    """
    plan = plan_batches(recipe, world_size)
    config = _without_auto(_read_json(recipe.deepspeed))
    problems = _misplaced(config)
    filler = _Filler(config, problems)
    train = recipe.train
    micro = f"train.micro_batch={'auto' if train.micro_batch == 'auto' else plan.micro_batch}"

    filler.fill("train_batch_size", train.global_batch, f"train.global_batch={train.global_batch}")
    filler.fill("train_micro_batch_size_per_gpu", plan.micro_batch, micro)
    filler.fill(
        "gradient_accumulation_steps",
        plan.accumulation,
        f"{plan.accumulation} from train.global_batch={train.global_batch}, {micro} and "
        f"{world_size} rank(s)",
    )
    filler.fill(
        "gradient_clipping", train.gradient_clip, f"train.gradient_clip={train.gradient_clip}"
    )
    if "bfloat16" in config:  # the old name of the section
        config.setdefault("bf16", config.pop("bfloat16"))
    for name in ("bf16", "fp16"):
        filler.fill(
            f"{name}.enabled", train.precision == name, f"train.precision={train.precision}"
        )
    if train.precision == "fp16" and isinstance(config["fp16"], dict):
        config["fp16"] = FP16_DEFAULTS | config["fp16"]
    _fill_monitors(filler, recipe, Path(run_dir))

    own = "the trainer's own torch AdamW, which needs"
    filler.fill("zero_allow_untested_optimizer", True, f"{own} true")
    filler.fill("zero_force_ds_cpu_optimizer", False, f"{own} false")
    for section, leaf in NON_FINITE_CHECKS:
        holder = config.get(section)
        if isinstance(holder, dict) and leaf in holder:
            filler.fill(f"{section}.{leaf}", True, "a check for non-finite steps, which needs true")
    _refuse_lost_states(config, recipe, problems)
    if _stage(config) == 3:
        problems += _not_for_stage_3(recipe)
    config.setdefault("steps_per_print", NEVER)
    config.setdefault("wall_clock_breakdown", False)
    _keep_from_waiting(config, world_size)
    if problems:
        raise RecipeError(
            [f"{recipe.deepspeed}: {problem}" for problem in problems],
            "deepspeed",
            "contradiction",
        )
    _check_by_deepspeed(config, recipe.deepspeed)
    if config.get("zero_optimization", {}).get("stage") not in (1, 2, 3):
        raise RecipeError(
            f"{recipe.deepspeed}: zero_optimization.stage should be 1, 2 or 3; on one GPU stage 1 "
            "costs nothing",
            "deepspeed",
            "unsupported",
        )
    return config


def _keep_from_waiting(config: dict[str, Any], world_size: int) -> None:
    """Turn off what has the host wait for the device at every micro-batch: DeepSpeed's own meter of
    throughput, where the file does not ask for it, and communication beside the backward pass where
    there is none.
    """
    timers = config.setdefault("timers", {})
    meter = timers.setdefault("throughput", {}) if isinstance(timers, dict) else None
    if isinstance(meter, dict):
        meter.setdefault("enabled", False)
    zero = config.get("zero_optimization")
    if isinstance(zero, dict) and zero.get("overlap_comm") and world_size == 1:
        zero["overlap_comm"] = False


def _stage(config: dict[str, Any]) -> object:
    zero = config.get("zero_optimization")
    return zero.get("stage") if isinstance(zero, dict) else None


def _not_for_stage_3(recipe: Recipe) -> list[str]:
    """What a recipe asks for that does not go where weights are divided among the ranks."""
    speed, objective = recipe.speed, recipe.objective
    asked = (
        (
            objective.reference_ema,
            f"objective.reference_ema={objective.reference_ema:g} needs the adapters whole on "
            "every rank",
            "reference_ema=0",
        ),
        (
            speed.compile != "off",
            f"what speed.compile={speed.compile} compiles has its weights elsewhere",
            "speed.compile=off",
        ),
        (
            speed.frozen_cache,
            f"with speed.frozen_cache={speed.frozen_cache} each rank would lack other pairs, while "
            "all of them gather the frozen weights together",
            "speed.frozen_cache=0",
        ),
    )
    return [
        f"zero_optimization.stage is 3, but {why}: use stage 1 or 2, e.g. deepspeed=zero2, or "
        f"{without}"
        for is_asked, why, without in asked
        if is_asked
    ]


def _refuse_lost_states(config: dict[str, Any], recipe: Recipe, problems: list[str]) -> None:
    """Offloaded states that a resumed run, or the moving average, would miss without a word."""
    zero = config.get("zero_optimization")
    offload = zero.get("offload_optimizer") if isinstance(zero, dict) else None
    if not isinstance(offload, dict):
        return
    if offload.get("device") == "nvme":
        problems.append(
            "zero_optimization.offload_optimizer.device is nvme, but DeepSpeed does not restore "
            "such an optimiser: a resumed run would go on from untrained weights; use cpu "
            "(offload_param may be nvme)"
        )
    elif recipe.adapter.ema is not None and offload.get("ratio", 1) != 1:
        # The average is a state of our own optimiser, which must hold and step all weights.
        problems.append(
            f"zero_optimization.offload_optimizer is {json.dumps(offload)}, but adapter.ema="
            f"{recipe.adapter.ema} needs the optimiser's states in one place: offload with ratio "
            "1, or set adapter.ema to null"
        )


class _Filler:
    """Fills dotted keys of a config; notes where the JSON already says otherwise."""

    def __init__(self, config: dict[str, Any], problems: list[str]) -> None:
        self.config = config
        self.problems = problems

    def fill(self, key: str, value: Any, origin: str) -> None:
        """Set ``key``; ``origin`` tells where the recipe keeps it, with its value."""
        section, _, leaf = key.rpartition(".")
        holder = self.config.setdefault(section, {}) if section else self.config
        if not isinstance(holder, dict):
            line = f"{section} is {json.dumps(holder)}; it should be a section {{...}}"
            if line not in self.problems:
                self.problems.append(line)
            return
        given = holder.setdefault(leaf, value)
        # True == 1 in Python, but "enabled": 1 is a slip.
        if given != value or isinstance(given, bool) != isinstance(value, bool):
            self.problems.append(
                f"{key} is {json.dumps(given)}, but the recipe has {origin}: "
                "make them agree, or take it out of the JSON"
            )


def _fill_monitors(filler: _Filler, recipe: Recipe, run_dir: Path) -> None:
    monitor = recipe.monitor
    for section, name, wanted in (
        ("tensorboard", "tensorboard", monitor.tensorboard),
        ("csv_monitor", "csv", monitor.csv),
    ):
        filler.fill(f"{section}.enabled", wanted, f"monitor.{name}={json.dumps(wanted)}")
        if wanted:  # written to <output_path>/<job_name>
            filler.fill(f"{section}.output_path", str(run_dir), f"run_dir={run_dir}")
            filler.fill(f"{section}.job_name", name, f"{run_dir}/{name} for it")
    project = recipe.monitor.wandb_project
    origin = f"monitor.wandb_project={json.dumps(project)}"
    filler.fill("wandb.enabled", project is not None, origin)
    if project is not None:
        filler.fill("wandb.project", project, origin)


def refuse_missing_trackers(config: Mapping[str, Any]) -> None:
    """OutsideError if the package of a tracker that is turned on is not installed."""
    for section, package in TRACKERS.items():
        spec = config.get(section)
        wanted = isinstance(spec, dict) and spec.get("enabled")
        if wanted and importlib.util.find_spec(package) is None:
            raise OutsideError(
                f"the tracker {section} needs the package {package}, which is not installed: "
                f"pip install {package}, or turn it off",
                section,
                "not-installed",
            )


def _misplaced(config: Mapping[str, Any]) -> list[str]:
    problems = [f"{key!r}: {where}" for key, where in KEPT_BY_RECIPE.items() if key in config]
    for key in config:
        if key not in KNOWN_KEYS:
            close = difflib.get_close_matches(key, KNOWN_KEYS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            problems.append(f"{key!r} is not a key of DeepSpeed{hint}")
    return problems


def _path_of(name: str) -> Path:
    """The file behind `deepspeed`: one that is shipped, by its bare name, or the user's own."""
    if "/" in name or name.endswith(".json"):
        return Path(locate(name))
    names = sorted(path.stem for path in shipped("ds_configs").glob("*.json"))
    if name not in names:
        raise RecipeError(
            f"deepspeed: {name!r} is none of {', '.join(names)}; a file of your own is written as "
            f"a path, such as ./{name}.json",
            "deepspeed",
            "unknown",
        )
    return shipped("ds_configs") / f"{name}.json"


def _read_json(name: str) -> dict[str, Any]:
    """A JSON object from a file, with duplicate keys refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {key!r} is given twice")
            found[key] = value
        return found

    path = _path_of(name)
    try:
        if not path.is_file():
            raise RecipeError(f"deepspeed: {name!r} is not a file", "deepspeed", "missing")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise RecipeError(
                f"{name} is larger than {MAX_BYTES >> 10} KiB: not a config", name, "too-large"
            )
        if lfs_pointer(raw):
            raise RecipeError(f"{name} {LFS_REMEDY}", name, "unreadable")
        config = json.loads(raw, object_pairs_hook=unique)
    except OSError as error:
        raise RecipeError(f"{name} cannot be read: {told_by(error)}", name, "unreadable") from None
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{name} is not valid JSON: {told_by(error)}", name, "damaged") from None
    if not isinstance(config, dict):
        raise RecipeError(f"{name} should hold one JSON object {{...}}", name, "wrong-type")
    return config


def _without_auto(value: Any) -> Any:
    """The config without ``"auto"``, which the Hugging Face trainer reads as "not given"."""
    if isinstance(value, dict):
        return {key: _without_auto(inner) for key, inner in value.items() if inner != "auto"}
    return value


def _check_by_deepspeed(config: dict[str, Any], name: str) -> None:
    """Let DeepSpeed validate its own sections now, before models are loaded."""
    from deepspeed.runtime.config import DeepSpeedConfig  # seconds to import

    # It would hold the batch size against the ranks that exist now, which may be none yet.
    probe = {key: value for key, value in config.items() if key != "train_batch_size"}
    try:
        DeepSpeedConfig(probe)
    except Exception as error:  # whatever it raises is about the file: we call nothing else
        raise RecipeError(
            f"{name}: DeepSpeed refuses it: {told_by(error)}", "deepspeed", "unsupported"
        ) from error


def divisors(number: int) -> list[int]:
    """All of them, the smallest first."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _one_of(numbers: list[int]) -> str:
    texts = [str(number) for number in numbers]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"
