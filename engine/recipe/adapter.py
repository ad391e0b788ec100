"""Sections of a recipe: what is trained, and what users get of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from .section import Fraction, PositiveFloat, PositiveInt, Section

TARGET_PRESETS = ("attention", "attention+ff", "all-linear", "lcm")


def _known_targets(value: object) -> object:
    """A preset, or a list of suffixes, of which only the model can say whether they exist."""
    listed = isinstance(value, tuple) and value and all(isinstance(item, str) for item in value)
    if listed or value in TARGET_PRESETS:
        return value
    raise PydanticCustomError(
        "targets", f"Input should be {', '.join(TARGET_PRESETS)}, or a list of layer names"
    )


_NAMES = {"type": "array", "items": {"type": "string"}, "minItems": 1}
Targets = Annotated[
    str | tuple[str, ...],
    BeforeValidator(_known_targets),
    WithJsonSchema({"anyOf": [{"enum": list(TARGET_PRESETS)}, _NAMES]}),
]


class Adapter(Section):
    """What is trained: low-rank adapters, or all of the denoiser."""

    type: Literal["lora", "full"] = "lora"
    """`lora`: adapters over frozen weights, which the reference shares. `full`: every weight of the
    denoiser; rank, alpha, dropout and targets mean nothing then, and the reference is a copy."""
    rank: PositiveInt = 8
    """Rank r of every adapter: capacity, memory and file size grow with it. The papers take
    r = alpha = 8 and `attention` for SD, 64 and `lcm` for LCM."""
    alpha: PositiveFloat = 8
    """Adapter output is scaled by alpha / rank."""
    dropout: Fraction = 0.0
    """Dropout on adapter inputs. It repeats on a resume, but not on another number of ranks."""
    targets: Targets = "attention"
    """Layers that get adapters: a preset (`attention`, `attention+ff`, `all-linear`, or `lcm`, the
    papers' choice for LCM: attention, feed-forward, convolutions, projections), or a list of names
    of linear layers and convolutions, each by its suffix, e.g. [to_q, to_v]."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank): large ranks then learn as fast as small ones (2312.03732)."""
    dora: bool = False
    """Train the length of each weight row apart from its direction (2402.09353). The step-0 output
    is unchanged to the bit; a step is slower and holds whole products of A and B."""
    rank_schedule: tuple[PositiveInt, ...] | None = None
    """Ranks that grow with the curriculum (Curriculum-DPO++): one a stage, e.g. [4, 8, 16, 32, 64],
    the last of them `rank`, which later stages keep. Memory and time are those of `rank` from the
    start, and so is the scale, alpha / rank. `null`: the whole rank from the start."""
    opening: Literal["all", "inside_out"] = "all"
    """`inside_out`: adapters of the mid block and the innermost pair of down and up blocks train
    first, each stage opens the next pair, and the last stage opens the rest."""
    ema: Annotated[float | None, Field(gt=0, lt=1)] = None
    """Decay of a moving average of what is trained, e.g. 0.999 averages some 1,000 steps; exported
    beside the last weights, in `ema/`. Four bytes a trained parameter, divided among the ranks."""

    start: str | None = None
    """Folder of an exported adapter, `lora/` of a run of this model and rank, that training goes on
    from; the reference stays the model without it. `null`: adapters that change nothing yet."""

    @property
    def grows(self) -> bool:
        """Whether what is trained grows with the stages."""
        return self.rank_schedule is not None or self.opening != "all"


class Export(Section):
    """The trained weights as others load them, in the run folder at the end of the run."""

    formats: tuple[Literal["diffusers", "kohya", "merged"], ...] = ("diffusers",)
    """`diffusers`: `lora/`, for `load_lora_weights`, with the same adapter for peft and, as
    `kohya.safetensors`, for ComfyUI, AUTOMATIC1111 and sd-scripts; on a `model.lcm_lora` also
    `lora_with_lcm/`, both in one. `kohya`: `kohya/lora.safetensors`, that file alone. `merged`:
    `merged/`, a copy of the base around a denoiser in float32; all that full fine-tuning can give.
    Adapters are small and lie in each checkpoint as well; merged is written once, at the end."""
    of: Literal["last", "best"] = "last"
    """Whose weights: those of the last step, or of the step that `evaluate` found best, which may
    be the first, the base's own. The adapter of the last step lies in its checkpoint in any case.
    """
    shard_gib: PositiveFloat = 5.0
    """Largest weights file of a merged pipeline: what one rank gathers at a time under ZeRO-3."""


def check_exports(adapter: Adapter, export: Export, *, has_kohya: bool) -> None:
    """ValueError for formats that this kind of adapter, or model, cannot be written in."""
    formats = export.formats
    if not has_kohya and "kohya" in formats:
        raise ValueError(
            "export.formats: kohya files have no names for the layers of this family; ComfyUI "
            "reads lora/pytorch_lora_weights.safetensors as it is: use diffusers or merged"
        )
    if adapter.type == "full" and set(formats) != {"merged"}:
        raise ValueError(
            f"export.formats=[{', '.join(formats)}] does not go with adapter.type=full, which "
            "leaves no adapter: use export.formats=[merged]"
        )
    if adapter.type == "full" and (adapter.dora or adapter.rslora or adapter.dropout):
        raise ValueError(
            "adapter.type=full has no adapters: leave dora and rslora false and dropout 0"
        )
    if adapter.dora and "kohya" in formats:
        raise ValueError(
            "export.formats: kohya files of DoRA adapters mean different things to the "
            "programs that read them, diffusers among them: use diffusers or merged"
        )
    if not formats:
        raise ValueError("export.formats is empty: the run would leave nothing to use")


def check_start(adapter: Adapter, reference_ema: float) -> None:
    """ValueError for what does not go on from an adapter that is there."""
    others = against_a_start(adapter, reference_ema)
    if adapter.start is not None and others:
        raise ValueError(
            f"adapter.start={adapter.start} does not go with {others[0]}: leave one of them out"
        )


def against_a_start(adapter: Adapter, reference_ema: float) -> list[str]:
    """What is given that does not go on from an adapter that is there."""
    others = {
        "adapter.type=full": adapter.type == "full",
        "adapter.dora=true": adapter.dora,
        "adapter.rank_schedule or opening": adapter.grows,
        "objective.reference_ema": bool(reference_ema),
    }
    return [other for other, given in others.items() if given]


def check_growth(adapter: Adapter, num_stages: int, weight_decay: float) -> None:
    """ValueError for an adapter that cannot grow as it says in so many stages of a curriculum."""
    if not adapter.grows:
        return
    ranks = adapter.rank_schedule or ()
    given = "adapter.rank_schedule" if ranks else f"adapter.opening={adapter.opening}"
    if adapter.type == "full":
        raise ValueError(f"{given} is for adapters: use adapter.type=lora, or leave it out")
    if num_stages == 1:
        raise ValueError(
            f"{given} needs stages to grow in, and this curriculum has one: use curriculum.tiers "
            "above 1 and an order, or leave it out"
        )
    if weight_decay:
        raise ValueError(
            f"{given} does not go with train.optimizer.weight_decay={weight_decay:g}, which would "
            "shrink what is not open yet: use weight_decay=0"
        )
    if adapter.rank_schedule is not None:
        _check_ranks(adapter.rank_schedule, adapter.rank, num_stages)


def _check_ranks(ranks: tuple[int, ...], rank: int, num_stages: int) -> None:
    shown = f"adapter.rank_schedule=[{', '.join(map(str, ranks))}]"
    if not ranks:
        raise ValueError(f"{shown} is empty: give one rank a stage, or null")
    if list(ranks) != sorted(ranks):
        raise ValueError(f"{shown} shrinks: ranks can only grow from stage to stage")
    if ranks[-1] != rank:
        raise ValueError(
            f"{shown} ends at {ranks[-1]}, and adapter.rank is {rank}: they must be the same, e.g. "
            f"adapter.rank={ranks[-1]}"
        )
    if len(ranks) > num_stages:
        raise ValueError(
            f"{shown} has {len(ranks)} ranks for {num_stages} stages: give at most one a stage"
        )
