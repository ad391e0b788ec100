"""What a run is: its resolved recipe on the disk, and what two recipes must share to be one run."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from pydantic_core import PydanticUndefined

from ..basics.errors import RecipeError
from ..basics.files import replacing
from .keys import KNOBS, SCHEMA, nearest_key
from .reference import annotated
from .schema import Recipe
from .yaml_subset import shown

# What a checkpoint may be resumed under: the keys that decide what a run computes. Left out are
# those that only move, watch or speed it up, and train.steps, so that a run can be extended.
IDENTITY = re.compile(
    r"seed|speed\.frozen_cache|data\.(lanes|shuffle_shards|posterior)"
    r"|(model|curriculum|objective|adapter|train\.optimizer)\..+"
    r"|train\.(global_batch|warmup_steps|gradient_clip|precision|caption_dropout)"
)

# Those of them that may be changed in the middle of a run (`--allow-change`): how steps are taken
# from here on. Neither shapes nor the order of pairs nor the meaning of the weights hang on them.
CHANGEABLE = re.compile(
    r"objective\.(?!type|target$|reference_ema).+|train\.optimizer\..+"
    r"|train\.(warmup_steps|gradient_clip|caption_dropout)|adapter\.dropout"
)
# And why the others may not.
FIXED = (
    (r"seed|data\..+|curriculum\..+|train\.global_batch", "it decides which pairs come when"),
    (r"speed\.frozen_cache", "it decides which noise a pair meets when"),
    (r"objective\.(type|target|reference_ema)", "it decides what the networks are held against"),
    (r"adapter\..+", "it decides what is trained, and what the trained numbers mean"),
    (r"model\..+|train\.precision", "it decides the numbers of the model that is trained"),
)

# Keys of a recipe's model that name files: what these hold decides, not where they lie.
MODEL_FILES = ("path", "revision", "variant", "vae", "unet", "lcm_lora", "teacher")

RESOLVED_HEADER = """\
# The recipe of this run as it was resolved: file, overrides and defaults in one. It is a record; to
# repeat the run elsewhere give it to --recipe with another run_dir.
"""


@dataclass(frozen=True)
class Change:
    """A key that was given another value in the middle of a run."""

    step: int
    """After so many steps."""
    key: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"after step {self.step}: {self.key} {self.before} -> {self.after}"


def save_resolved(recipe: Recipe, path: str | Path, changes: Sequence[Change] = ()) -> None:
    """Write every knob of ``recipe`` and what it is for as YAML, atomically; read back, it is the
    same recipe. Comments tell of ``changes``.
    """
    history = "".join(f"# Changed {change}\n" for change in changes)
    text = RESOLVED_HEADER + history + annotated(recipe)
    with replacing(path, error=RecipeError) as file:
        file.write(text.encode())


def is_resolved(path: Path) -> bool:
    """Whether a file was written by :func:`save_resolved`: its folder is a run's."""
    try:
        with path.open("rb") as file:
            return file.read(len(RESOLVED_HEADER)) == RESOLVED_HEADER.encode()
    except OSError:
        return False


def training_identity(recipe: Recipe) -> dict[str, object]:
    """The dotted keys, and their values, that a resumed run must share with its checkpoint."""
    found: dict[str, object] = {}
    for key in filter(IDENTITY.fullmatch, KNOBS):
        value = attrgetter(key)(recipe)
        found[key] = list(value) if isinstance(value, tuple) else value
    return found


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 over :func:`training_identity`; equal recipes have equal hashes."""
    identity = training_identity(recipe)
    for key, value in identity.items():  # 8 and 8.0 are equal, but not in JSON
        if isinstance(value, float) and value.is_integer():
            identity[key] = int(value)
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def diff_identity(
    old: Mapping[str, object], new: Mapping[str, object], *, by_name: bool = True
) -> list[str]:
    """:func:`differences` as lines like ``objective.beta: checkpoint 5000.0, recipe 2000.0``."""
    return [
        f"{key}: checkpoint {before}, recipe {now}"
        for key, (before, now) in differences(old, new, by_name=by_name).items()
    ]


def differences(
    old: Mapping[str, object], new: Mapping[str, object], *, by_name: bool = True
) -> dict[str, tuple[str, str]]:
    """By key the values of a checkpoint and of a recipe where they differ, as a recipe spells them;
    the names of the model's files only ``by_name``.

    A knob that is younger than the checkpoint counts as its default there: defaults of new knobs
    are what was done before.
    """
    absent = object()

    def value_of(identity: Mapping[str, object], key: str) -> object:
        default = SCHEMA[key].get_default() if key in SCHEMA else PydanticUndefined
        return identity.get(key, absent if default is PydanticUndefined else default)

    def show(value: object) -> str:
        return "not set" if value is absent else shown(value)

    names = () if by_name else {"adapter.start", *(f"model.{key}" for key in MODEL_FILES)}
    pairs = {key: (value_of(old, key), value_of(new, key)) for key in (*new, *old)}
    return {
        key: (show(before), show(now))
        for key, (before, now) in pairs.items()
        if before != now and key not in names
    }


def refuse_unchangeable(key: str) -> None:
    """RecipeError, kind `unknown`, `no-effect` or `unsupported`, if `--allow-change` of a key is
    none that it may be used for.
    """
    if key not in KNOBS:
        kind, why = "unknown", f"unknown key; {nearest_key(key)}"
    elif not IDENTITY.fullmatch(key):
        kind, why = "no-effect", "it may differ anyway: leave --allow-change away"
    elif not CHANGEABLE.fullmatch(key):
        reason = next(text for pattern, text in FIXED if re.fullmatch(pattern, key))
        kind, why = "unsupported", f"{reason}, so another value needs another run_dir"
    else:
        return
    raise RecipeError(f"--allow-change {key}: {why}", key, kind)


def allowing(key: str, value: object) -> str:
    """What to add to a command so that its run goes on with another value."""
    return f"`--allow-change {key} {key}={shown(value)}`"
