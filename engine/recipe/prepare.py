"""Section `prepare` of a recipe: where images and preferences come from, or how they are made."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from .section import NonNegativeInt, PositiveInt, Sampler, Section


class Generate(Section):
    """Candidates sampled from the model for every prompt, ranked by the reward: the method."""

    type: Literal["generate"] = "generate"
    """`generate`: sample candidates and rank them with the reward. `masked`: sample winners, and
    losers that are told less of the prompt. `paired`: a data set of two images, a label and a
    caption. `ranked`: a data set of images with captions and scores."""


class Masked(Section):
    """Winners of the whole prompt, losers of one that is partly zero: ranked without a reward.

    As in Curriculum-DPO++. `prepare.candidates_per_prompt` counts the winners, of which each tier
    pairs up to `curriculum.pairs_per_prompt_per_tier`; `difficulty`, `binning` and `min_score_gap`
    of the curriculum mean nothing. The reward is loaded by `compare` alone.
    """

    type: Literal["masked"] = "masked"
    """`masked`: winners, and losers that are told less of the prompt, are sampled."""
    fractions: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.9, 0.7, 0.5, 0.3, 0.1)
    """Share of the prompt embedding's entries that is zero for the losers of each tier, the easiest
    first (published: from 0.9 to 0.1)."""
    same_noise: bool = True
    """A loser begins with its winner's noise, so that they differ by the prompt alone; false: with
    noise of its own. The paper does not say."""

    @model_validator(mode="after")
    def _tiers_get_harder(self) -> Masked:
        falls = all(b < a for a, b in zip(self.fractions, self.fractions[1:], strict=False))
        if not self.fractions or not falls:
            raise ValueError(
                f"fractions=[{_listed(self.fractions)}] must fall from tier to tier, each below "
                "the one before: the more of a prompt is zero, the easier is the pair"
            )
        return self


class Imported(Section):
    """What every data set that is already there has."""

    type: str
    path: str
    """The data set: a file (.parquet, .tar, or .csv, .tsv, .jsonl, .json, also with .gz), a folder
    of files of one kind, or a pattern such as `pickapic/train-*.parquet`; for `paired` also a
    folder with one folder of winners and one of losers. Paths in a table are relative to its
    folder; absolute ones and `..` are followed, so look into a stranger's table before its images
    are read."""
    caption: str = "caption"
    """Column with the caption (in a tar a key of its KEY.json, or else its KEY.txt; with folders of
    images a folder of NAME.txt, or NAME.txt beside an image; NAME.caption will do as well).
    Captions that are empty or among `prompts.heldout` are left out, and counted."""
    limit: PositiveInt | None = None
    """Use only the first so many rows: for trying a recipe out."""
    max_unreadable: NonNegativeInt = 0
    """Rows that may be left out, and counted, because an image is missing, damaged or too large;
    one more stops the import and names file and row."""


_Images = Annotated[
    Annotated[tuple[str, str], Tag("as two columns")] | Annotated[str, Tag("as one column")],
    Discriminator(lambda value: "as one column" if isinstance(value, str) else "as two columns"),
]
Order = Literal["higher", "lower"] | None
_RANKS = {"rank", "ranks", "ranking", "rankings", "ranked", "place", "placing", "placement"}


def _check_order(order: Order, columns: Sequence[str], key: str) -> None:
    """ValueError where it is left open whether 1 is best, or said of scores that are not given."""
    if order and not columns:
        raise ValueError(f"order={order} means nothing without {key}, the columns it is said of")
    for name in columns:
        words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)}
        if order is None and words & _RANKS:
            raise ValueError(
                f"{key}={name} is called like a rank: say order=lower if 1 is best, order=higher "
                "if the highest is"
            )


class Paired(Imported):
    """Pairs that people, or another model, judged. The defaults are Pick-a-Pic v2's columns."""

    type: Literal["paired"] = "paired"
    """`paired`: a data set of two images, a label and a caption."""
    images: _Images = ("jpg_0", "jpg_1")
    """Columns (members of a tar, sub-folders) with the two images: encoded bytes, or paths. One
    name: a column with lists of two."""
    label: str | None = "label_0"
    """Column that says how the first image did: 1 it won, 0 it lost, 0.5 a tie, which is left out;
    or a list with a number for each image, of which the higher one wins; null: the first image of
    every row is the winner."""
    has_label: str | None = "has_label"
    """Column that says whether the row was judged at all, used where the table has it: a row that
    was not is left out, whatever `label` holds; null: never look."""
    best_image: str | None = "best_image_uid"
    """Column with the id of the better image, used where the table has it and `image_ids`: a row it
    contradicts `label` in is left out; null: never look."""
    image_ids: tuple[str, str] | None = ("image_0_uid", "image_1_uid")
    """Columns with the images' ids, used where the table has them; null: file and row."""
    scores: tuple[str, str] | None = None
    """Columns with a score of each image, to take difficulty from; null: the recipe's reward scores
    both."""
    order: Order = None
    """Which of `scores` is better: see `order` of `ranked`."""
    on_disagreement: Literal["drop", "keep", "swap"] = "drop"
    """Where the scores contradict the label: `drop` the pair, `keep` the label (such pairs are the
    hardest), or `swap`: believe the scores."""

    @model_validator(mode="after")
    def _scores_have_an_order(self) -> Paired:
        _check_order(self.order, self.scores or (), "scores")
        return self


class Ranked(Imported):
    """Images with scores, ranked and paired within each caption as sampled candidates are."""

    type: Literal["ranked"] = "ranked"
    """`ranked`: a data set of images with captions and scores."""
    image: str = "image"
    """Column (member of a tar) with the image: encoded bytes, or a path; in JSON also a list of
    paths, each with the score at its place of a list in `score`."""
    score: str | None = "score"
    """Column with its score; null: the recipe's reward scores it."""
    order: Order = None
    """Which score is better: `higher`, or `lower` where it is a rank and 1 is best; null is
    `higher`, but a column that is called like a rank needs it said. Lower ones are kept with their
    sign turned."""

    @model_validator(mode="after")
    def _scores_have_an_order(self) -> Ranked:
        _check_order(self.order, (self.score,) if self.score else (), "score")
        return self


Source = Annotated[Generate | Masked | Paired | Ranked, Field(discriminator="type")]


def check_source(
    source: Source, difficulty: str, tiers: int, train: object | None, heldout: object | None
) -> None:
    """ValueError where the source does not go with the curriculum or the prompts."""
    if source.type == "paired" and difficulty != "score_gap":
        raise ValueError(
            "prepare.source.type=paired needs curriculum.difficulty=score_gap: two images have "
            "only one gap in rank"
        )
    if isinstance(source, Masked) and len(source.fractions) != tiers:
        raise ValueError(
            f"prepare.source.fractions=[{_listed(source.fractions)}] has {len(source.fractions)} "
            f"shares for curriculum.tiers={tiers}: give one a tier"
        )
    if isinstance(source, Generate | Masked) and train is None:
        raise ValueError("prompts.train: missing: the prompts to sample candidates for")
    if train is None and heldout is None:
        raise ValueError(
            "prompts.heldout: missing: with no prompts.train either, there is nothing to compare on"
        )


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


class Prepare(Section):
    """Stage 1: candidates, scores, pairs, shards."""

    source: Source = Generate()
    """Where images and preferences come from: sampled, or a data set that is already there."""
    candidates_per_prompt: Annotated[int, Field(ge=2)] = 50
    """Images ranked for each prompt (M in the papers, 500 there, 50 reported about equal)."""
    sampler: Sampler = Sampler()
    """Sampling of candidates."""
    batch_size: PositiveInt = 16
    """Images in one denoiser call (guidance doubles the rows); bounds memory."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp16"
    """Arithmetic of the denoiser in sampling; the VAE always works in float32. CPUs are faster with
    `fp32`."""
    contact_sheet_prompts: NonNegativeInt = 4
    """Prompts shown in contact_sheet.png, with ranked candidates and one pair of each tier."""
