"""A function of the user's own, named `package.module:function` in the recipe.

Only a name is taken, never code: a recipe from elsewhere can run nothing that is not installed
here or on PYTHONPATH. What the name says is imported, and so runs, like any module is.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import OutsideError
from ..recipe_reward import PythonSpec


class PythonFunction:
    """``function(images, prompts)``, each a list, returns one floating number an image.

    The fingerprint is that of the module's source: an edited function scores anew.
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
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise OutsideError(
            f"reward.function={name} cannot be imported: {reason}; install its package, or put its "
            "folder on PYTHONPATH"
        ) from None
    if not callable(found):
        raise OutsideError(f"reward.function={name} is a {type(found).__name__}, not a function")
    return found  # type: ignore[no-any-return]


def source_of(function: Callable[..., Any], name: str) -> bytes:
    """Name and source of the function's module; the name alone where there is no source."""
    try:
        module = inspect.getmodule(function)
        return f"{name}\n{inspect.getsource(module) if module else ''}".encode()
    except (OSError, TypeError):  # built in, or compiled
        return name.encode()
