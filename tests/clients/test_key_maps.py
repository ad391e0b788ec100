"""Programs that cannot be installed here, by what their code says of names: each finds every tensor
of our kohya files in the model as it holds it, and in the shape that it has there.

The facts are those of

- https://github.com/CompVis/stable-diffusion (ldm/modules/diffusionmodules/openaimodel.py) and
  https://github.com/Stability-AI/generative-models: layers of the original UNets;
- https://github.com/comfyanonymous/ComfyUI (comfy/lora.py, comfy/utils.py): original names, and all
  of diffusers' that it lists; of Z-Image and Qwen-Image those of its own modules alone, which are
  diffusers' of Qwen-Image, and of Z-Image what z_image_to_diffusers is made from;
- https://github.com/AUTOMATIC1111/stable-diffusion-webui (extensions-builtin/Lora/networks.py):
  diffusers' names of Stable Diffusion 1 by pattern; what is not found so, by its original name;
- https://github.com/kohya-ss/sd-scripts (networks/lora.py, library/original_unet.py and
  sdxl_original_unet.py): its own UNets, named as diffusers' for Stable Diffusion 1 and 2, as the
  original for XL. It makes adapters inside of transformers, resnets and changes of size alone.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import diffusers
import pytest
import torch
from cdpo.engine.models.adapters import PRESETS, add_lora
from cdpo.engine.recipe import Adapter
from cdpo.engine.training.kohya_format import describe, kohya_tensors
from cdpo.engine.training.lora import Lora, trained_lora
from diffusers import UNet2DConditionModel
from peft import get_peft_model_state_dict

CONFIGS = Path(__file__).parents[2] / "assets" / "configs"
RANK = 4
Layers = dict[str, tuple[int, ...]]
Rules = tuple[tuple[str, Callable[..., str]], ...]


@dataclass(frozen=True)
class Original:
    """A UNet as the original code is configured: 320 channels, two resnets a level."""

    folder: str
    levels: tuple[tuple[int, int], ...]
    """Multiple of the channels, and depth of the transformers, of each level."""
    middle: int
    text: int
    linear: bool
    """Whether transformers project linearly, or by convolutions of 1 x 1."""
    labels: int = 0


MODELS = {
    "sd15": Original(
        "stable-diffusion-v1-5--stable-diffusion-v1-5",
        ((1, 1), (2, 1), (4, 1), (4, 0)),
        middle=1,
        text=768,
        linear=False,
    ),
    "sd21": Original(
        "sd2-community--stable-diffusion-2-1",
        ((1, 1), (2, 1), (4, 1), (4, 0)),
        middle=1,
        text=1024,
        linear=True,
    ),
    "sdxl": Original(
        "stabilityai--stable-diffusion-xl-base-1.0",
        ((1, 0), (2, 2), (4, 10)),
        middle=10,
        text=2048,
        linear=True,
        labels=2816,
    ),
}


def layers_of(model: Original) -> Layers:
    """Every linear layer and convolution with the shape of its weights, as the original numbers
    them: steps down, each a resnet and perhaps a transformer, or a halving; and up again.
    """
    time = 1280
    found: Layers = {"time_embed.0": (time, 320), "time_embed.2": (time, time)}
    found |= {"input_blocks.0.0": (320, 4, 3, 3), "out.2": (4, 320, 3, 3)}
    if model.labels:
        found |= {"label_emb.0.0": (time, model.labels), "label_emb.0.2": (time, time)}

    def resnet(at: str, into: int, out: int) -> None:
        found[f"{at}.in_layers.2"] = (out, into, 3, 3)
        found[f"{at}.emb_layers.1"] = (out, time)
        found[f"{at}.out_layers.3"] = (out, out, 3, 3)
        if into != out:
            found[f"{at}.skip_connection"] = (out, into, 1, 1)

    def transformer(at: str, width: int, depth: int) -> None:
        for side in ("proj_in", "proj_out"):
            found[f"{at}.{side}"] = (width, width) if model.linear else (width, width, 1, 1)
        for index in range(depth):
            block = f"{at}.transformer_blocks.{index}"
            for attention, keys in (("attn1", width), ("attn2", model.text)):
                for name, into in (("q", width), ("k", keys), ("v", keys), ("out.0", width)):
                    found[f"{block}.{attention}.to_{name}"] = (width, into)
            found[f"{block}.ff.net.0.proj"] = (8 * width, width)
            found[f"{block}.ff.net.2"] = (width, 4 * width)

    skips, width, step = [320], 320, 1
    for level, (multiple, depth) in enumerate(model.levels):
        for _ in range(2):
            resnet(f"input_blocks.{step}.0", width, 320 * multiple)
            width = 320 * multiple
            if depth:
                transformer(f"input_blocks.{step}.1", width, depth)
            skips.append(width)
            step += 1
        if level < len(model.levels) - 1:
            found[f"input_blocks.{step}.0.op"] = (width, width, 3, 3)
            skips.append(width)
            step += 1
    resnet("middle_block.0", width, width)
    transformer("middle_block.1", width, model.middle)
    resnet("middle_block.2", width, width)
    step = 0
    for level, (multiple, depth) in reversed(list(enumerate(model.levels))):
        for index in range(3):
            resnet(f"output_blocks.{step}.0", width + skips.pop(), 320 * multiple)
            width = 320 * multiple
            if depth:
                transformer(f"output_blocks.{step}.1", width, depth)
            if level and index == 2:
                found[f"output_blocks.{step}.{2 if depth else 1}.conv"] = (width, width, 3, 3)
            step += 1
    return found


IN_RESNET = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}
# Diffusers' names of layers, with what they are called originally where there are two resnets a
# level. ComfyUI and AUTOMATIC1111 agree on these.
DOWN, UP = r"down_blocks_(\d+)_", r"up_blocks_(\d+)_"
SHARED: Rules = (
    (DOWN + r"attentions_(\d+)_(.+)", lambda a, b, c: f"input_blocks_{1 + 3 * a + b}_1_{c}"),
    (DOWN + r"resnets_(\d+)_(.+)", lambda a, b, c: f"input_blocks_{1 + 3 * a + b}_0_{c}"),
    (DOWN + "downsamplers_0_conv", lambda a: f"input_blocks_{3 + 3 * a}_0_op"),
    (r"mid_block_attentions_0_(.+)", lambda c: f"middle_block_1_{c}"),
    (r"mid_block_resnets_(\d+)_(.+)", lambda a, c: f"middle_block_{2 * a}_{c}"),
    (UP + r"attentions_(\d+)_(.+)", lambda a, b, c: f"output_blocks_{3 * a + b}_1_{c}"),
    (UP + r"resnets_(\d+)_(.+)", lambda a, b, c: f"output_blocks_{3 * a + b}_0_{c}"),
    ("conv_in", lambda: "input_blocks_0_0"),
    ("conv_out", lambda: "out_2"),
    (r"time_embedding_linear_(\d+)", lambda a: f"time_embed_{2 * a - 2}"),
)
# And where they do not.
IN_COMFY: Rules = (
    (r"add_embedding_linear_(\d+)", lambda a: f"label_emb_0_{2 * a - 2}"),
    # after whatever else the step holds
    (UP + "upsamplers_0_conv", lambda a: f"output_blocks_{3 * a + 2}_*_conv"),
)
IN_A1111: Rules = (
    (UP + "upsamplers_0_conv", lambda a: f"output_blocks_{3 * a + 2}_{2 if a else 1}_conv"),
)


def translated(name: str, rules: Rules) -> str | None:
    for pattern, template in rules:
        if found := re.fullmatch(pattern, name):
            words = [int(word) if word.isdigit() else word for word in found.groups()]
            if "resnets" in pattern:
                words[-1] = IN_RESNET.get(words[-1], words[-1])
            return template(*words)
    return None


def comfyui(key: str, layers: dict[str, str], _: UNet2DConditionModel) -> str | None:
    """The layer that ComfyUI changes by what is called `key`."""
    name = key.removeprefix("lora_unet_")
    if name in layers:
        return layers[name]
    wanted = translated(name, (*SHARED, *IN_COMFY)) or ""
    found = [wanted.replace("*", place) for place in "12" if wanted.replace("*", place) in layers]
    return layers[found[0]] if found else None


def a1111(key: str, layers: dict[str, str], _: UNet2DConditionModel) -> str | None:
    name = key.removeprefix("lora_unet_")
    return layers.get(translated(name, (*SHARED, *IN_A1111)) or "") or layers.get(name)


def sd_scripts(key: str, layers: dict[str, str], unet: UNet2DConditionModel) -> str | None:
    """Its own names, and none for what lies outside of the modules that it adapts."""
    name = key.removeprefix("lora_unet_")
    if re.match(r"time_embed|label_emb|add_embed|conv_|input_blocks_0_|out_2", name):
        return None
    if "label_emb_0_0" in layers:
        return layers.get(name)
    own = {module.replace(".", "_") for module, _ in unet.named_modules()}
    return comfyui(key, layers, unet) if name in own else None


READERS = {"ComfyUI": comfyui, "AUTOMATIC1111": a1111}
MOST, OUTSIDE = "lcm", ("conv_in", "conv_out", "to_q")
TARGETS = [
    MOST,
    OUTSIDE,
    *(
        pytest.param(name, marks=pytest.mark.long)
        for name in [*PRESETS, "all-linear"]
        if name != MOST
    ),
]


@functools.cache
def adapter(name: str, targets: str | tuple[str, ...]) -> tuple[UNet2DConditionModel, Lora]:
    """Of a whole model, on the meta device: names and shapes."""
    config = json.loads((CONFIGS / MODELS[name].folder / "unet" / "config.json").read_text())
    spec = Adapter(rank=RANK, targets=targets)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        add_lora(unet, spec, seed=0)
    return unet, trained_lora(get_peft_model_state_dict(unet), spec)


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_each_program_finds_every_tensor(name: str, targets: str | tuple[str, ...]) -> None:
    unet, lora = adapter(name, targets)
    tensors = kohya_tensors(lora, unet.config)
    shapes = layers_of(MODELS[name])
    layers = {layer.replace(".", "_"): layer for layer in shapes}
    keys = sorted({key.partition(".")[0] for key in tensors})
    assert len(tensors) == 3 * len(keys) == 3 * len(lora.layers)
    for reader in READERS.values():
        found = {key: reader(key, layers, unet) for key in keys}
        assert [key for key, layer in found.items() if layer is None] == []
        assert len(set(found.values())) == len(keys)
        for key, layer in found.items():
            out, into, *kernel = shapes[layer or ""]
            assert tensors[f"{key}.lora_down.weight"].shape == (RANK, into, *kernel)
            assert tensors[f"{key}.lora_up.weight"].shape == (out, RANK, *(1 for _ in kernel))
            assert tensors[f"{key}.alpha"] == RANK
    unknown = [key for key in keys if sd_scripts(key, layers, unet) is None]
    outside = re.compile(r"lora_unet_(time_embed|label_emb|conv_in|conv_out|input_blocks_0_|out_2)")
    assert unknown == [key for key in keys if outside.match(key)]
    assert not unknown or targets == "all-linear" or "conv_in" in targets


def layers_of_z_image(width: int = 3840, text: int = 2560, depth: int = 30) -> Layers:
    """Every linear layer of Z-Image in ComfyUI, with the shape of its weights; `told` is the width
    of the timestep.
    """
    told, hidden = 256, 10240
    found: Layers = {"x_embedder": (width, 64), "cap_embedder.1": (width, text)}
    found |= {"t_embedder.mlp.0": (1024, told), "t_embedder.mlp.2": (told, 1024)}
    found |= {"final_layer.linear": (64, width), "final_layer.adaLN_modulation.1": (width, told)}
    for blocks, number in (("layers", depth), ("noise_refiner", 2), ("context_refiner", 2)):
        for at in (f"{blocks}.{index}" for index in range(number)):
            found[f"{at}.attention.qkv"] = (3 * width, width)
            found[f"{at}.attention.out"] = (width, width)
            found |= {f"{at}.feed_forward.w{side}": (hidden, width) for side in (1, 3)}
            found[f"{at}.feed_forward.w2"] = (width, hidden)
            if blocks != "context_refiner":
                found[f"{at}.adaLN_modulation.0"] = (4 * width, told)
    return found


@pytest.mark.parametrize("name", ["Tongyi-MAI--Z-Image", "Qwen--Qwen-Image"])
def test_comfyui_finds_every_tensor_of_a_transformer(name: str) -> None:
    config = json.loads((CONFIGS / name / "transformer" / "config.json").read_text())
    spec = Adapter(rank=RANK, targets="all-linear")
    with torch.device("meta"):
        network = getattr(diffusers, config["_class_name"]).from_config(config)
        shapes = {
            key: tuple(layer.weight.shape)
            for key, layer in network.named_modules()
            if isinstance(layer, torch.nn.Linear)
        }
        add_lora(network, spec, seed=0)
        tensors = kohya_tensors(
            trained_lora(get_peft_model_state_dict(network), spec), network.config
        )
    if "Z-Image" in name:
        shapes = layers_of_z_image()
    found = {
        key: (len(tensors[f"{key}.lora_up.weight"]), tensors[f"{key}.lora_down.weight"].shape[1])
        for key in {key.partition(".")[0] for key in tensors}
    }
    assert found == {f"lora_unet_{key.replace('.', '_')}": shape for key, shape in shapes.items()}


def test_why_layers_of_xl_bear_their_original_names() -> None:
    """AUTOMATIC1111 looks for XL's first upsampler where Stable Diffusion 1 has it."""
    layers = {layer.replace(".", "_"): layer for layer in layers_of(MODELS["sdxl"])}
    unet, lora = adapter("sdxl", "lcm")
    assert len(lora.layers) == 788
    names = [f"lora_unet_{layer.replace('.', '_')}" for layer in lora.layers]
    missed = [name for name in names if a1111(name, layers, unet) is None]
    assert missed == ["lora_unet_up_blocks_0_upsamplers_0_conv"]


@pytest.mark.parametrize(
    ("name", "prediction", "version", "architecture"),
    [
        ("sd15", "epsilon", "sd_v1", "stable-diffusion-v1/lora"),
        ("sd21", "epsilon", "sd_v2", "stable-diffusion-v2-512/lora"),
        ("sd21", "v_prediction", "sd_v2", "stable-diffusion-v2-768-v/lora"),
        ("sdxl", "epsilon", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_files_say_what_they_fit(
    name: str, prediction: str, version: str, architecture: str
) -> None:
    """AUTOMATIC1111 lists a file by `ss_base_model_version` (XL: sdxl_…) and `ss_v2` (True)."""
    about = describe(adapter(name, MOST)[0].config, prediction, (768, 512), "mine")
    assert about["ss_base_model_version"] == version
    assert about["ss_v2"] == str(version == "sd_v2")
    assert about["modelspec.architecture"] == architecture
    assert about["modelspec.resolution"] == "512x768"
    assert about["modelspec.title"] == about["ss_output_name"] == "mine"
