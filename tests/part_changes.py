"""Changing one part of a model or reward in place, as somebody does who trains or edits it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file


def _scaled(folder: Path, name: str) -> None:
    """One tensor of a weights file times 1.05, under the same name and of the same size."""
    [path] = folder.glob("*.safetensors")
    tensors = load_file(path)
    tensors[name] = tensors[name] * 1.05
    save_file(tensors, path, {"format": "pt"})


def _edited(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    found = json.loads(path.read_text())
    edit(found)
    path.write_text(json.dumps(found))


def _swap_two_tokens(tokenizer: dict[str, Any]) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]


# By what is done: the part that is then another, and how it is done to a folder of `tiny.build`.
CHANGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "unet": ("model", lambda sd: _scaled(sd / "unet", "conv_in.weight")),
    "unet config": (
        "model_config",
        lambda sd: _edited(sd / "unet/config.json", lambda found: found.update(norm_eps=1e-4)),
    ),
    "vae": ("vae", lambda sd: _scaled(sd / "vae", "decoder.conv_in.weight")),
    "vae config": (
        "vae_config",
        lambda sd: _edited(sd / "vae/config.json", lambda found: found.update(scaling_factor=0.4)),
    ),
    "text encoder": (
        "text",
        lambda sd: _scaled(sd / "text_encoder", "final_layer_norm.weight"),
    ),
    "tokenizer": ("text", lambda sd: _edited(sd / "tokenizer/tokenizer.json", _swap_two_tokens)),
    "betas": (
        "noise",
        lambda sd: _edited(
            sd / "scheduler/scheduler_config.json", lambda found: found.update(beta_end=0.021)
        ),
    ),
    "spacing": (
        "sampler",
        lambda sd: _edited(
            sd / "scheduler/scheduler_config.json",
            lambda found: found.update(timestep_spacing="trailing"),
        ),
    ),
}
OF_REWARD: dict[str, Callable[[Path], object]] = {
    "weights": lambda clip: _scaled(clip, "visual_projection.weight"),
    "tokenizer": lambda clip: _edited(clip / "tokenizer.json", _swap_two_tokens),
    "processor": lambda clip: _edited(
        clip / "preprocessor_config.json", lambda found: found.update(image_mean=[0.4, 0.4, 0.4])
    ),
}
