"""A function of the user's own, named `package.module:function` in the recipe.

Only a name is taken, never code: a recipe from elsewhere can run nothing that is not installed
here or on PYTHONPATH. What the name says is imported, and so runs, like any module is.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..basics.errors import OutsideError, told_by
from ..recipe.reward import PythonSpec


class PythonFunction:
    """``function(images, prompts)``, each a list, returns one floating number an image.

    The fingerprint is that of source, of the module that is named and the one that the function is
    of (another, where it was imported there or is wrapped): an edited function scores anew.
    """

    def __init__(self, spec: PythonSpec, device: torch.device) -> None:
        del device
        self.function = load_function(spec.function)
        self.fingerprint = hashlib.sha256(source_of(self.function, spec.function)).hexdigest()

    def score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        scores: np.ndarray = np.asarray(self.function(list(images), list(prompts)))
        return scores


def load_function(name: str) -> Callable[..., Any]:
    """What a name ``package.module:function`` stands for. OutsideError where it cannot be had."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # importing runs the module, which may raise anything
        raise OutsideError(
            f"reward.function={name} cannot be imported: {told_by(error)}; install its package, or "
            "put its folder on PYTHONPATH",
            "reward.function",
            "not-installed",
        ) from None
    if not callable(found):
        message = f"reward.function={name} is a {type(found).__name__}, not a function"
        raise OutsideError(message, "reward.function", "wrong-type")
    return found  # type: ignore[no-any-return]


def source_of(function: Callable[..., Any], name: str) -> bytes:
    """Name, and source of the named module and the function's own, as far as there is any."""
    named = sys.modules[name.partition(":")[0]]
    own = inspect.getmodule(function)
    modules = [named] if own in (named, None) else [named, own]
    return "\n".join([name, *map(_source, modules)]).encode()


def _source(module: ModuleType) -> str:
    try:
        return inspect.getsource(module)
    except (OSError, TypeError):  # built in, or compiled
        return ""
