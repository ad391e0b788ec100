"""What one YAML file may say: the sections of a recipe. Reading one is :mod:`.reading`'s."""

from .adapter import Adapter
from .data import Curriculum, Data, Fetch
from .model import Model
from .prepare import Generate, Imported, Masked, Paired, Ranked
from .prompts import Prompts, Split, Templates
from .reward import Reward
from .schema import Recipe
from .section import Sampler
from .train import Objective, Optimizer, Speed

__all__ = [
    "Adapter",
    "Curriculum",
    "Data",
    "Fetch",
    "Generate",
    "Imported",
    "Masked",
    "Model",
    "Objective",
    "Optimizer",
    "Paired",
    "Prompts",
    "Ranked",
    "Recipe",
    "Reward",
    "Sampler",
    "Speed",
    "Split",
    "Templates",
]
