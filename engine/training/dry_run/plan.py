"""What a recipe will take, computed and not measured: sizes, operations, memory of each rank.

``train.py --dry-run`` prints it as tables for a terminal of 80 columns. Networks are built from
their configs on the meta device, so no weights and no shards are read, and a plan for a cluster can
be made on a laptop; of shards that are there the manifest tells if pairs repeat. Operations are
counted, not assumed, and given in units of one denoiser forward over one image.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from torch import nn

from ....kernels.fuse import fuse
from ...basics.errors import DataError
from ...basics.memory import device_memory
from ...curriculum.pacing import Pacing, stage_tiers
from ...display.terminal import Terminal
from ...models import DTYPES
from ...models.adapters import add_lora
from ...models.few_steps import describe_few_steps, refuse_guidance
from ...models.quantization import Quantized, describe_quantized
from ...models.tuning import choose_tuning, is_on
from ...objectives import build_objective
from ...ranks.launcher import local_size
from ...recipe import Recipe
from ...shards.remote.fetch import is_remote
from ...shards.remote.store import open_store
from ..batch import describe_beta, describe_moving, describe_pairs, describe_stages
from ..deepspeed_config import BatchPlan, build_deepspeed_config, plan_batches
from ..evaluation import DRAWS
from ..frozen.place import place_of, record_bytes
from ..growth import growth_rows
from .memory import Footprint, Row, Sizes, Zero, total
from .networks import MetaModel, activation_bytes, forward_flops, read_meta_model, training_flops

GIB = 1 << 30
# GiB that PyTorch sees of a card of each size: of a GeForce 4090, an H100 and an H200.
DEVICES = {"24 GB": 23.5, "80 GB": 79.1, "141 GB": 139.8}


@dataclass(frozen=True)
class Plan:
    """The numbers behind the tables."""

    networks: dict[str, tuple[int, int]]
    """Parameters of each network, and how many of them train."""
    forward_flops: int
    """Of one denoiser forward over one image: one unit."""
    training_units: float
    """Of the policy's forward and backward over one image."""
    trained_images: int
    """Images of a pair that the policy is trained on."""
    frozen_passes: int
    """Forward passes of frozen networks for a pair, a unit each."""
    memory: list[Row]
    """Of each rank."""
    batches: BatchPlan
    """How a rank works through its share of a step."""
    fits: bool
    """Whether `auto` is planned to fit this machine's device; True for a number of the recipe."""
    auto: dict[str, int]
    """By device what `train.micro_batch: auto` would choose; 0 where not one pair fits."""
    zero_stage: int
    """ZeRO stage of the run."""
    tuning: str
    """The speed knobs that are on, on this machine."""
    latent_shape: tuple[int, ...]
    """(C, h, w) of an image."""
    shipped: tuple[str, ...]
    """Models whose configs are those that come with cdpo."""
    quantized: Quantized | None
    """What of the denoiser is in fewer bits."""
    few_steps: list[tuple[str, str]]
    """What to warn of where the model was distilled to few steps."""
    embeds_guidance: bool
    """Whether guidance is told to the denoiser, in one pass."""

    @property
    def units_per_pair(self) -> float:
        """Of all passes for one pair."""
        return self.trained_images * self.training_units + self.frozen_passes


def make_plan(recipe: Recipe, world_size: int, device: torch.device) -> Plan:
    """Compute the plan of a recipe for so many ranks; ``device`` is where `auto` knobs look.

    Raises:
        RecipeError: as the training itself would, for what does not fit together.
        OutsideError: for a model whose configs cannot be read.
    """
    spec, resolution = recipe.model, recipe.model.resolution
    config = build_deepspeed_config(recipe, world_size, recipe.run_dir)
    batches = plan_batches(recipe, world_size)
    dtype = DTYPES[recipe.train.precision]
    model = read_meta_model(spec, dtype)
    refuse_guidance(recipe, model.denoiser.config, model.index)
    stage = int(config["zero_optimization"]["stage"])
    tuning = choose_tuning(recipe.speed, model.denoiser, device, training=True)

    parts = {"denoiser": model.denoiser, "VAE": model.vae, **_text_encoders(recipe, model)}
    networks = {name: (count_parameters(part), 0) for name, part in parts.items()}
    unit = forward_flops(model, model.denoiser, resolution)
    frozen, quantized = _frozen_parameters(recipe, model), _quantized(recipe, model)
    policy = _build_policy(recipe, model)
    trained = sum(weight.numel() for weight in policy.parameters() if weight.requires_grad)
    if recipe.adapter.type == "full":
        networks["denoiser"] = (trained, trained)
    else:
        networks["adapter"] = (trained, trained)

    # Operations first: what is fused is no longer made of operators that are counted.
    training_units = training_flops(model, policy, resolution) / unit
    if tuning.fused_kernels:
        fuse(policy)
    objective = build_objective(recipe.objective)
    zero = Zero.from_config(config["zero_optimization"], world_size)
    footprint = footprint_of(recipe, model, policy, frozen, zero, quantized)
    share, fits = batches.pairs_per_rank, True
    if recipe.train.micro_batch == "auto":
        memory = device_memory(device, local_size(world_size))
        found = footprint.most_pairs(share, memory, device.type)
        micro, fits = found or 1, found > 0
        batches = BatchPlan(share, micro, share // micro)
    if recipe.speed.fused_kernels == "auto" and not tuning.fused_kernels:
        fuse(policy)  # as on the devices below
    on_gpu = footprint_of(recipe, model, policy, frozen, zero, quantized)
    return Plan(
        networks=networks,
        forward_flops=unit,
        training_units=training_units,
        trained_images=objective.trained_images,
        frozen_passes=objective.frozen_passes,
        memory=footprint.rows(batches.micro_batch),
        batches=batches,
        fits=fits,
        auto={
            name: on_gpu.most_pairs(share, int(gib * GIB), "cuda") for name, gib in DEVICES.items()
        },
        zero_stage=stage,
        tuning=str(tuning),
        latent_shape=model.latent_shape(resolution),
        shipped=model.shipped,
        quantized=quantized,
        few_steps=describe_few_steps(recipe, model.denoiser.config, model.index),
        embeds_guidance=bool(model.denoiser.config.get("guidance_embeds")),
    )


def read_footprint(recipe: Recipe, world_size: int, device: torch.device) -> Footprint:
    """What a rank of a training will hold on such a device, of the model's configs alone.

    Raises RecipeError and OutsideError as :func:`make_plan`.
    """
    config = build_deepspeed_config(recipe, world_size, recipe.run_dir)
    model = read_meta_model(recipe.model, DTYPES[recipe.train.precision])
    frozen, quantized = _frozen_parameters(recipe, model), _quantized(recipe, model)
    policy = _build_policy(recipe, model)
    if is_on(recipe.speed.fused_kernels, device.type == "cuda"):
        fuse(policy)
    zero = Zero.from_config(config["zero_optimization"], world_size)
    return footprint_of(recipe, model, policy, frozen, zero, quantized)


def footprint_of(
    recipe: Recipe,
    model: MetaModel,
    policy: ModelMixin,
    frozen: Mapping[str, int],
    zero: Zero,
    quantized: Quantized | None = None,
) -> Footprint:
    """Of the policy as it is fused or not; its checkpointing is changed."""
    trained = sum(weight.numel() for weight in policy.parameters() if weight.requires_grad)
    moving = trained if recipe.objective.reference_ema else 0
    sizes = Sizes(
        policy=count_parameters(policy),
        trained=trained,
        frozen={**frozen, "reference": frozen["reference"] + moving},
        bytes_per_weight=DTYPES[recipe.train.precision].itemsize,
        text_encoders=sum(map(bytes_of, _text_encoders(recipe, model).values())),
        vae=bytes_of(model.vae),
        activations=activation_bytes(
            model,
            policy,
            build_objective(recipe.objective).trained_images,
            recipe.model.resolution,
            checkpointing=recipe.speed.activation_checkpointing,
        ),
        in_fewer_bits=quantized.weights if quantized else 0,
        quantized=quantized.num_bytes if quantized else 0,
        averaged=recipe.adapter.ema is not None,
        moving=moving,
    )
    return Footprint(
        sizes,
        zero,
        streamed_reference=_streams_reference(recipe),
        encoders="host" if recipe.speed.encoders == "offload" else "device",
    )


def count_parameters(network: nn.Module) -> int:
    """Elements of all parameters."""
    return sum(weight.numel() for weight in network.parameters())


def bytes_of(network: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    tensors = [*network.parameters(), *network.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _build_policy(recipe: Recipe, model: MetaModel) -> ModelMixin:
    """The denoiser as it is trained; it stays the model's."""
    policy: ModelMixin = model.denoiser
    if recipe.adapter.type == "full":
        policy.requires_grad_(True)
    else:
        policy = add_lora(policy, recipe.adapter, recipe.seed)
    if recipe.speed.activation_checkpointing:
        policy.enable_gradient_checkpointing()
    return policy.train()


def _text_encoders(recipe: Recipe, model: MetaModel) -> Mapping[str, nn.Module]:
    """Those that are loaded."""
    return model.text_encoders if recipe.data.text == "live" else {}


def _frozen_parameters(recipe: Recipe, model: MetaModel) -> dict[str, int]:
    """Parameters of frozen networks beside the policy; 0 where they are the policy's own."""
    size = count_parameters(model.denoiser)
    frozen = {"reference": size if recipe.adapter.type == "full" else 0}
    if recipe.objective.needs_teacher:
        # The diffusion model before it was distilled: without the projection of the guidance.
        told = getattr(model.denoiser.time_embedding, "cond_proj", None)
        frozen["teacher"] = size - (count_parameters(told) if told is not None else 0)
    return frozen


def _quantized(recipe: Recipe, model: MetaModel) -> Quantized | None:
    """Of a denoiser that has no adapters yet, whose layers stay whole."""
    kind = recipe.model.quantization
    return None if kind is None else Quantized.of(model.denoiser, kind)


def _streams_reference(recipe: Recipe) -> bool:
    return recipe.adapter.type == "full" and recipe.train.reference == "offload"


HEADS = ("of", "units", "FLOP")


def print_plan(recipe: Recipe, world_size: int, terminal: Terminal) -> None:
    """Compute the plan of a recipe for so many ranks and print it.

    Raises RecipeError and OutsideError as :func:`make_plan`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = make_plan(recipe, world_size, device)
    _print_header(plan, recipe, world_size, device, terminal)
    _print_networks(plan, terminal)
    _print_operations(plan, recipe, terminal)
    _print_memory(plan.memory, terminal)


def _print_header(
    plan: Plan, recipe: Recipe, world_size: int, device: torch.device, terminal: Terminal
) -> None:
    height, width = recipe.model.resolution
    batches = plan.batches
    rows = [
        ("model", f"{recipe.model.path}, {height}x{width} pixels, {recipe.train.precision}"),
        ("ranks", f"{world_size}, ZeRO-{plan.zero_stage} of {recipe.deepspeed}"),
        (
            "step",
            f"{recipe.train.global_batch} pairs; on each rank {batches.accumulation} x "
            f"{batches.micro_batch}{'' if plan.fits else f', more than this {device.type} takes'}",
        ),
        ("auto", f"train.micro_batch {', '.join(_auto_text(*each) for each in plan.auto.items())}"),
        *describe_quantized(plan.quantized),
        ("speed", f"{plan.tuning} (auto as for the {device.type} of this machine)"),
        *_pairs_rows(recipe),
        *describe_beta(recipe, plan.latent_shape),
        *describe_moving(recipe.objective),
        *plan.few_steps,
        *_cache_rows(plan, recipe),
        *growth_rows(recipe.adapter, len(stage_tiers(recipe.curriculum))),
        *(
            ("configs", f"of {name} as shipped: it is not in the hub's cache")
            for name in plan.shipped
        ),
    ]
    terminal.header(f"dry run  {recipe.run_dir}  computed, not measured", rows)


def _auto_text(name: str, pairs: int) -> str:
    return f"{pairs or 'none'} in {name}"


def _pairs_rows(recipe: Recipe) -> list[tuple[str, str]]:
    """What is known of pairs and stages; of shards that are not here yet nothing is."""
    pacing, rows = Pacing(recipe.curriculum, recipe.train.steps), []
    if not is_remote(recipe.shards_at):
        with suppress(DataError):  # whoever reads them says what is wrong
            manifest = open_store(recipe.shards_at, recipe.data).manifest()
            rows = describe_pairs(recipe, manifest, pacing)
    return rows + describe_stages(pacing)


def _cache_rows(plan: Plan, recipe: Recipe) -> list[tuple[str, str]]:
    """Bytes of the frozen-pass cache, if there is to be one."""
    if not (draws := recipe.speed.frozen_cache):
        return []
    of_pair = draws * record_bytes(recipe.objective, plan.latent_shape)
    text = f"{draws} draws, {of_pair:,} bytes a pair"
    if not is_remote(recipe.shards_at):
        with suppress(DataError):
            pairs = open_store(recipe.shards_at, recipe.data).manifest().num_pairs
            text += f", at most {of_pair * pairs / 2**20:,.1f} MiB for {pairs} pairs"
    return [("cache", f"{text}, in {place_of(recipe)}")]


def _print_networks(plan: Plan, terminal: Terminal) -> None:
    cells = [
        [name, f"{parameters:,}", f"{trained:,}"]
        for name, (parameters, trained) in plan.networks.items()
    ]
    terminal.line()
    terminal.table("networks", ["network", "parameters", "trained"], cells)


def _print_operations(plan: Plan, recipe: Recipe, terminal: Terminal) -> None:
    pairs_per_step = recipe.train.global_batch
    counts = [
        ("forward, one image", 1.0),
        ("forward and backward, one image", plan.training_units),
        ("frozen passes, one pair", plan.frozen_passes),
        ("all passes, one pair", plan.units_per_pair),
        ("all passes, one step", plan.units_per_pair * pairs_per_step),
    ]
    if recipe.speed.frozen_cache:
        kept = plan.units_per_pair - plan.frozen_passes
        counts.insert(4, ("all passes, one pair that is kept", kept))
    if recipe.evaluate.every:
        counts.append(
            (
                "one evaluation, without scorers",
                evaluation_units(recipe, embeds_guidance=plan.embeds_guidance),
            )
        )
    cells = [
        [name, f"{units:.2f}", flops_text(units * plan.forward_flops)] for name, units in counts
    ]
    terminal.line()
    terminal.table("operations (a unit: one denoiser forward, one image)", HEADS, cells)


def evaluation_units(recipe: Recipe, *, embeds_guidance: bool = False) -> float:
    """Denoiser forwards over one image in an evaluation: the policy's samples, and the KL proxy."""
    spec, sampler = recipe.evaluate, recipe.evaluate.sampler or recipe.compare.sampler
    twice = sampler.guidance > 1 and recipe.model.family.guided_twice and not embeds_guidance
    return spec.prompts * spec.images * (sampler.steps * (1 + twice) + 2 * DRAWS)


def _print_memory(rows: list[Row], terminal: Terminal) -> None:
    whole = total(rows)
    unit, size = ("GiB", GIB) if whole.device >= GIB else ("MiB", GIB >> 10)
    places = [place for place in ("device", "host", "nvme") if getattr(whole, place)]
    cells = [
        [row.name, *(_number(getattr(row, place) / size) for place in places), row.note]
        for row in [*rows, whole]
    ]
    terminal.line()
    terminal.table(f"memory of each rank, {unit}", ["of", *places, ""], cells)


def _number(value: float) -> str:
    return f"{value:.2f}" if value else "–"


def flops_text(flops: float) -> str:
    """With the prefix that leaves one to three digits before the point."""
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if flops >= scale:
            return f"{flops / scale:.3f} {prefix}FLOP"
    return f"{flops / 1e6:.3f} MFLOP"
