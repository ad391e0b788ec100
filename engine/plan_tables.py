"""The plan of a run as tables for a terminal of 80 columns."""

from __future__ import annotations

import torch

from .curriculum.pacing import stage_tiers
from .display.terminal import Terminal
from .growth import growth_rows
from .plan import Plan, make_plan
from .plan_memory import Row, total
from .recipe import Recipe

GIB = 1 << 30
HEADS = ("of", "units", "FLOP")


def print_plan(recipe: Recipe, world_size: int, terminal: Terminal) -> None:
    """Compute the plan of a recipe for so many ranks and print it.

    Raises RecipeError and OutsideError as :func:`make_plan`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = make_plan(recipe, world_size, device)
    _print_header(plan, recipe, world_size, device, terminal)
    _print_networks(plan, terminal)
    _print_operations(plan, recipe.train.global_batch, terminal)
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
            f"{batches.micro_batch}",
        ),
        ("speed", f"{plan.tuning} (auto as for the {device.type} of this machine)"),
        *growth_rows(recipe.adapter, len(stage_tiers(recipe.curriculum))),
    ]
    terminal.header(f"dry run  {recipe.run_dir}  computed, not measured", rows)


def _print_networks(plan: Plan, terminal: Terminal) -> None:
    cells = [
        [name, f"{parameters:,}", f"{trained:,}"]
        for name, (parameters, trained) in plan.networks.items()
    ]
    terminal.line()
    terminal.table("networks", ["network", "parameters", "trained"], cells)


def _print_operations(plan: Plan, pairs_per_step: int, terminal: Terminal) -> None:
    counts = (
        ("forward, one image", 1.0),
        ("forward and backward, one image", plan.training_units),
        ("frozen passes, one pair", plan.frozen_passes),
        ("all passes, one pair", plan.units_per_pair),
        ("all passes, one step", plan.units_per_pair * pairs_per_step),
    )
    cells = [
        [name, f"{units:.2f}", flops_text(units * plan.forward_flops)] for name, units in counts
    ]
    terminal.line()
    terminal.table("operations (a unit: one denoiser forward, one image)", HEADS, cells)


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
