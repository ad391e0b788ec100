"""`train.micro_batch: auto` becomes a number, by the plan of the dry run or the last checkpoint.

The number moves sums by rounding and nothing else, but a run that is resumed on as many ranks is to
go on to the last bit: its checkpoints tell the number, which is taken as long as it fits.
"""

from __future__ import annotations

from ..basics.errors import RecipeError
from ..basics.memory import device_memory
from ..ranks import Ranks
from ..recipe import Recipe
from .deepspeed_config import plan_batches
from .dry_run.memory import PLANNED_SHARE
from .dry_run.plan import GIB, read_footprint


def settle_micro_batch(
    recipe: Recipe, ranks: Ranks, before: tuple[int, int] | None, *, trains: bool
) -> tuple[Recipe, str | None]:
    """The recipe with a number for `train.micro_batch`, the same on all ranks, and what there is to
    say about it.

    Args:
        recipe: with a number already, it is given back as it is.
        ranks: all of them come here.
        before: ranks, and pairs in one forward, of the last checkpoint.
        trains: whether there are steps to take; else the number means nothing, and any will do.

    Raises:
        RecipeError: where not one pair fits, with what would be needed.
        OutsideError: for a model whose configs cannot be read.
    """
    if recipe.train.micro_batch != "auto":
        return recipe, None
    memory = min(ranks.gather(device_memory(ranks.device, ranks.local_size)))
    pairs, note = ranks.on_first(lambda: _choose(recipe, ranks, before, memory, trains))
    train = recipe.train.model_copy(update={"micro_batch": pairs})
    return recipe.model_copy(update={"train": train}), note


def _choose(
    recipe: Recipe, ranks: Ranks, before: tuple[int, int] | None, memory: int, trains: bool
) -> tuple[int, str | None]:
    share = plan_batches(recipe, ranks.world_size).pairs_per_rank
    kept = before[1] if before is not None and before[0] == ranks.world_size else 0
    # What a number of the recipe that was larger than the share stood for
    kept = min(kept, share) if kept and share % min(kept, share) == 0 else 0
    if not trains:
        return kept or 1, None
    kind = ranks.device.type
    footprint = read_footprint(recipe, ranks.world_size, ranks.device)
    if kept and footprint.needed(kept, kind) <= PLANNED_SHARE * memory:
        return kept, None
    pairs = footprint.most_pairs(share, memory, kind)
    if not pairs:
        needed = footprint.needed(1, kind) / GIB
        raise RecipeError(
            f"train.micro_batch=auto: one pair is planned to take {needed:.1f} GiB of a rank's "
            f"{kind} memory, and of its {memory / GIB:.1f} GiB {PLANNED_SHARE:.0%} are planned "
            "with: try speed.activation_checkpointing=true, speed.encoders=offload, another "
            "deepspeed or more ranks, or take the risk with train.micro_batch=1",
            "train.micro_batch",
            "too-large",
        )
    if before is None:
        return pairs, None
    ran = f"{before[1]} on {before[0]}" if before[0] != ranks.world_size else f"{before[1]}"
    return pairs, (
        f"train.micro_batch=auto is chosen anew: {pairs} pairs in a forward of each of "
        f"{ranks.world_size} rank(s), before {ran}; sums round otherwise from here on"
    )
