"""What one YAML file may say: the sections of a recipe. Reading one is :mod:`.reading`'s."""

from .adapter import Adapter
from .data import Curriculum, Data, Fetch
from .model import Model
from .prepare import Generate, Imported, Masked, Paired, Ranked
from .prompts import Prompts, Split, Templates
from .reward import (
    AestheticSpec,
    CaptionSimilaritySpec,
    ClipScoreSpec,
    ColorfulnessSpec,
    CombinedReward,
    HpsSpec,
    ImageRewardSpec,
    JpegIncompressibilitySpec,
    JpegSpec,
    Part,
    PickScoreSpec,
    PythonSpec,
    Reward,
    VoteSpec,
    WeightedSpec,
)
from .schema import Recipe
from .section import Sampler
from .train import Objective, Optimizer, Speed

__all__ = [
    "Adapter",
    "AestheticSpec",
    "CaptionSimilaritySpec",
    "ClipScoreSpec",
    "ColorfulnessSpec",
    "CombinedReward",
    "Curriculum",
    "Data",
    "Fetch",
    "Generate",
    "HpsSpec",
    "ImageRewardSpec",
    "Imported",
    "JpegIncompressibilitySpec",
    "JpegSpec",
    "Masked",
    "Model",
    "Objective",
    "Optimizer",
    "Paired",
    "Part",
    "PickScoreSpec",
    "Prompts",
    "PythonSpec",
    "Ranked",
    "Recipe",
    "Reward",
    "Sampler",
    "Speed",
    "Split",
    "Templates",
    "VoteSpec",
    "WeightedSpec",
]
