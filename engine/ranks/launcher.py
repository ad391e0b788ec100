"""What a launcher says of this process: which rank it is, of how many, and where they meet."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..basics.errors import RecipeError

NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # by several ranks
REMEDY = (
    "a launcher such as `deepspeed` or `torchrun` sets WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR "
    "and MASTER_PORT; without one, unset them"
)


@dataclass(frozen=True)
class Launched:
    """This process among those that a launcher has started; one alone where none did."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    """Ranks on this machine."""


def launched() -> Launched:
    """What the environment says; RecipeError, which names the variable, if it is incomplete or
    contradicts itself.
    """
    world_size = _number("WORLD_SIZE", 1, least=1)
    if world_size > 1:
        for name in NEEDED:
            if not os.environ.get(name):
                raise RecipeError(
                    f"{name} is not in the environment, but WORLD_SIZE={world_size}: {REMEDY}",
                    name,
                    "missing",
                )
    _number("MASTER_PORT", 1, least=1, most=2**16 - 1)
    here = local_size(world_size)
    return Launched(
        rank=_number("RANK", 0, most=world_size - 1),
        world_size=world_size,
        local_rank=_number("LOCAL_RANK", 0, most=here - 1),
        local_size=here,
    )


def local_size(world_size: int) -> int:
    """Ranks on this machine, as the launcher says; all of them where it does not."""
    name = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in os.environ else "LOCAL_SIZE"
    return _number(name, world_size, least=1, most=world_size)


def _number(name: str, default: int, *, least: int = 0, most: int = 2**31 - 1) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 11):
        raise RecipeError(f"{name}={text!r} is not a number: {REMEDY}", name, "wrong-type")
    if not least <= int(text) <= most:
        raise RecipeError(
            f"{name}={text} is not in {least}..{most}: {REMEDY}", name, "out-of-range"
        )
    return int(text)
