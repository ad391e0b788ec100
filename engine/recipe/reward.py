"""Sections `reward` and `compare.judge` of a recipe: what ranks the images.

`type` chooses; a section without it is a `clip_score`. Every type has those keys alone that change
something there. What the types do lives in :mod:`cdpo.engine.rewards`, where ``made_by`` points: a
new one is a class here, its name in ``_Single``, and a file there.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from .prepare import Source
from .section import PositiveInt, Section


class RewardSection(Section):
    """What every reward has."""

    type: str
    made_by: ClassVar[str]
    """Module and class in :mod:`cdpo.engine.rewards` that score so, imported when they are used."""
    memory_only: ClassVar[frozenset[str]] = frozenset({"batch_size"})
    names: ClassVar[frozenset[str]] = frozenset({"path", "revision"})
    """Fields that name files: what these hold counts, not where they lie. A field that is not among
    them counts by its spelling."""

    @property
    def label(self) -> str:
        """Type, and what else tells it from others, on one line: for tables and messages."""
        return f"{self.type} {self.source}".strip()

    @property
    def source(self) -> str:
        """Where it comes from: the path of its weights, the name of its function; may be empty."""
        return ""

    @property
    def images_per_call(self) -> int:
        """Images that are scored, and so held in memory, at a time."""
        return 64

    def identity(self) -> dict[str, Any]:
        """What the scores are a function of, apart from the content of the files named: `type`,
        `path` and every knob that is not at its default, so that a new knob changes no old hash.
        """
        chosen = self.model_dump(mode="json", exclude_defaults=True, exclude=set(self.memory_only))
        return {"type": self.type} | chosen

    def knobs(self) -> dict[str, Any]:
        """:meth:`identity` without the names of files."""
        return {key: value for key, value in self.identity().items() if key not in self.names}

    def settings(self) -> str:
        """Short hash of the knobs of :meth:`identity` that are no names of files; empty where all
        are at their defaults: a part of the fingerprint of scores.
        """
        names = {"type", "path", "revision"}
        knobs = {key: value for key, value in self.identity().items() if key not in names}
        text = json.dumps(knobs, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16] if knobs else ""


class NetworkReward(RewardSection):
    """What every reward with weights has."""

    path: str
    """The weights: folder, file or hub id."""
    batch_size: PositiveInt = 64
    """Images scored in one call; bounds memory, and is halved where that does not suffice."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the networks; scores are float32 in any case."""

    @property
    def source(self) -> str:
        return self.path

    @property
    def images_per_call(self) -> int:
        return self.batch_size


class ModelReward(NetworkReward):
    """What every reward has whose weights are a model of transformers."""

    path: str
    """Folder or hub id of the model; of `hps` and `image_reward` the checkpoint as a local file."""
    revision: str | None = None
    """Branch, tag or commit on the hub; pin it for a run others should repeat."""


class ClipScoreSpec(ModelReward):
    """Cosine between image and prompt."""

    made_by = "clip:ClipScore"
    type: Literal["clip_score"] = "clip_score"
    """`clip_score`: cosine of a CLIP model between image and prompt. All types: docs/rewards.md."""


class PickScoreSpec(ModelReward):
    """A preference model of the CLIP family."""

    made_by = "clip:PickScore"
    names = RewardSection.names | {"processor"}
    type: Literal["pick_score"] = "pick_score"
    """`pick_score`: cosine times the model's temperature, of any CLIP-family preference model."""
    processor: str | None = None
    """Folder or hub id of tokenizer and image processor where they are not beside the weights, as
    those of PickScore v1: `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`."""


class HpsSpec(NetworkReward):
    """Human preference score v2 and v2.1."""

    made_by = "hps:Hps"
    names = RewardSection.names | {"tokenizer"}
    type: Literal["hps"] = "hps"
    """`hps`: cosine of HPS v2.1, from its published checkpoint."""
    path: str
    """The checkpoint as a local file, `HPS_v2.1_compressed.pt` or the same tensors as
    .safetensors."""
    tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """Folder or hub id of the tokenizer: CLIP's for `hps`, BERT's for `image_reward`."""


class AestheticSpec(ModelReward):
    """LAION's aesthetic predictor."""

    made_by = "aesthetic:Aesthetic"
    names = RewardSection.names | {"head"}
    type: Literal["aesthetic"] = "aesthetic"
    """`aesthetic`: LAION's predictor of a rating from 1 to 10; the prompt does not count."""
    path: str = "openai/clip-vit-large-patch14"
    """Folder or hub id of the CLIP ViT-L/14 whose image embeddings are rated."""
    head: str
    """The predictor as a local file: `sac+logos+ava1-l14-linearMSE.pth`, the first version's
    `sa_0_4_vit_l_14_linear.pth`, or the same tensors as .safetensors."""


class ImageRewardSpec(NetworkReward):
    """ImageReward v1."""

    made_by = "image_reward:ImageReward"
    names = RewardSection.names | {"tokenizer"}
    type: Literal["image_reward"] = "image_reward"
    """`image_reward`: ImageReward v1.0, a BLIP trained on rankings, from its published file."""
    path: str
    """The checkpoint as a local file, `ImageReward.pt` or the same tensors as .safetensors."""
    tokenizer: str = "bert-base-uncased"
    """Folder or hub id of BERT's tokenizer."""


class CaptionSimilaritySpec(ModelReward):
    """Text alignment as in the papers: what a captioner sees, compared with the prompt."""

    made_by = "caption_similarity:CaptionSimilarity"
    names = RewardSection.names | {"sentence_model"}
    type: Literal["caption_similarity"] = "caption_similarity"
    """`caption_similarity`: a vision-language model says what it sees, a sentence model compares
    that with the prompt."""
    path: str
    """Folder or hub id of the model that captions: any of transformers' image-to-text kinds."""
    sentence_model: str
    """Folder or hub id of a sentence-transformers model, e.g.
    `sentence-transformers/all-MiniLM-L6-v2`."""
    question: str = "Answer concisely: what is going on in this image?"
    """What a model that takes a prompt is asked; unused for pure captioners."""
    max_new_tokens: PositiveInt = 40
    """Longest caption, in tokens; captions are decoded greedily."""


class JpegSpec(RewardSection):
    """File size as JPEG."""

    made_by = "pixels:JpegSize"
    type: Literal["jpeg_compressibility"] = "jpeg_compressibility"
    """`jpeg_compressibility`: minus the kB of the image as JPEG of quality 95."""


class JpegIncompressibilitySpec(RewardSection):
    """File size as JPEG."""

    made_by = "pixels:JpegSize"
    type: Literal["jpeg_incompressibility"] = "jpeg_incompressibility"
    """`jpeg_incompressibility`: the kB of the image as JPEG of quality 95."""


class ColorfulnessSpec(RewardSection):
    """Colourfulness as people judge it."""

    made_by = "pixels:Colorfulness"
    type: Literal["colorfulness"] = "colorfulness"
    """`colorfulness`: Hasler and Süsstrunk's measure; 0 is gray, 100 extremely colourful."""


class PythonSpec(RewardSection):
    """A function of the user's own."""

    made_by = "python_function:PythonFunction"
    type: Literal["python"] = "python"
    """`python`: a function of your own."""
    function: str
    """`package.module:function`, importable as any installed module is; called with a list of PIL
    images and a list of prompts, it returns one number an image. Code itself has no place here."""
    batch_size: PositiveInt = 64
    """Images scored in one call."""

    @property
    def source(self) -> str:
        return self.function

    @property
    def images_per_call(self) -> int:
        return self.batch_size

    @field_validator("function")
    @classmethod
    def _is_a_name(cls, function: str) -> str:
        module, colon, name = function.partition(":")
        if not colon or not all(part.isidentifier() for part in [*module.split("."), name]):
            raise ValueError(f"{function!r} should be package.module:function")
        return function


def _clip_score_unless_told(value: object) -> object:
    return {"type": "clip_score"} | value if isinstance(value, dict) else value


_Single = (
    ClipScoreSpec
    | PickScoreSpec
    | HpsSpec
    | AestheticSpec
    | ImageRewardSpec
    | CaptionSimilaritySpec
    | JpegSpec
    | JpegIncompressibilitySpec
    | ColorfulnessSpec
    | PythonSpec
)
SingleReward = Annotated[
    _Single, Field(discriminator="type"), BeforeValidator(_clip_score_unless_told)
]


class Part(Section):
    """One reward of several."""

    reward: SingleReward
    """Any reward but `weighted` and `vote`."""
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Its share in the whole; below 0 it counts against an image."""


class CombinedReward(RewardSection):
    """Several rewards in one. Its scores compare images of one prompt with each other, and mean
    nothing beyond.
    """

    rewards: tuple[Part, ...]
    """The rewards and their weights: a list of `{reward: {type: ...}, weight: 1.0}`."""

    @property
    def source(self) -> str:
        parts = [f"{part.weight:g} x ({part.reward.label})" for part in self.rewards]
        return " + ".join(parts)

    def identity(self) -> dict[str, Any]:
        parts = [part.reward.identity() | {"weight": part.weight} for part in self.rewards]
        return {"type": self.type, "rewards": parts}

    def knobs(self) -> dict[str, Any]:
        parts = [part.reward.knobs() | {"weight": part.weight} for part in self.rewards]
        return {"type": self.type, "rewards": parts}

    @model_validator(mode="after")
    def _something_counts(self) -> CombinedReward:
        if not any(part.weight for part in self.rewards):
            raise ValueError("rewards: give at least one, with a weight that is not 0")
        return self


class WeightedSpec(CombinedReward):
    """Weighted sum of several rewards."""

    made_by = "combined:Weighted"
    type: Literal["weighted"] = "weighted"
    """`weighted`: sum of several rewards, each standardised over the images of a prompt."""


class VoteSpec(CombinedReward):
    """Several rewards that vote."""

    made_by = "combined:Vote"
    type: Literal["vote"] = "vote"
    """`vote`: share of a prompt's other images that an image beats, mean over several rewards."""


Reward = Annotated[
    _Single | WeightedSpec | VoteSpec,
    Field(discriminator="type"),
    BeforeValidator(_clip_score_unless_told),
]


def check_reward(reward: Reward, source: Source) -> None:
    """ValueError where the reward cannot score what `prepare` reads."""
    unscored = (source.type == "paired" and source.scores is None) or (
        source.type == "ranked" and source.score is None
    )
    if unscored and isinstance(reward, CombinedReward):
        raise ValueError(
            f"reward.type={reward.type} compares the images of a prompt with each other, and a "
            f"data set ({source.type}) is scored as it is read, a few images at a time: use a "
            "single reward, or scores that come with the data"
        )
