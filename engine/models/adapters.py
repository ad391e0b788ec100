"""What is trained of a denoiser: low-rank adapters (LoRA, rsLoRA, DoRA), or all of it.

Under adapters the reference is a structural twin whose parameters are the same tensors, made before
the adapter is added: no second copy of the weights, and no switching between the two passes.
"""

from __future__ import annotations

import copy
import re
from itertools import chain

import deepspeed
import torch
from diffusers import ModelMixin
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..basics.errors import RecipeError
from ..recipe import Adapter
from .low_rank import add_in_one_product

# Names by suffix, `*` for a number. The second halves are those of transformers in which text and
# image attend to each other: as diffusers' train_dreambooth_lora_sd3 and _flux, SimpleTuner (`all`,
# `all+ffs`) and ai-toolkit train them. FLUX.1's blocks of one stream have a projection out of
# attention and feed-forward together, which `all+ffs` and ai-toolkit count to the second.
# In the last block of Stable Diffusion 3 and of Qwen-Image what is made of text is not used: there
# adapters of it have no gradient, and their B stays zero, as in those trainers' files. Without them
# those that follow would be drawn otherwise, and checkpoints from before would not fit.
ATTENTION = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    # FLUX.2's blocks of one stream have attention and feed-forward in two projections, which
    # DiffSynth-Studio trains as well.
    *("to_qkv_mlp_proj", "single_transformer_blocks.*.attn.to_out"),
)
FEED_FORWARD = (
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    *("proj_mlp", "single_transformer_blocks.*.proj_out"),
    *("ff.conv_inverted", "ff.conv_point"),  # SANA's, whose third convolution is a channel wide
    # Of Qwen-Image and Z-Image, as verl and DiffSynth-Studio name them.
    *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    *("img_mlp.proj", "img_mlp.gate_layer", "img_mlp.out"),  # Qwen-Image 2.1's
    *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),  # FLUX.2's
)
PROJECTIONS = ("proj_in", "proj_out", "time_emb_proj")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
PRESETS = {
    "attention": ATTENTION,
    "attention+ff": ATTENTION + FEED_FORWARD,
    "lcm": ATTENTION + FEED_FORWARD + PROJECTIONS + CONVOLUTIONS,
}


def twin_of(network: ModelMixin, *, own: bool = False) -> ModelMixin:
    """A network of the same structure over the very same parameter tensors, and what is constant;
    with ``own``, those that train are copies.
    """
    shared = [p for p in network.parameters() if not (own and p.requires_grad)]
    # A table of places, as Stable Diffusion 3.5's, is a tenth of its weights.
    return copy.deepcopy(network, memo={id(x): x for x in (*shared, *network.buffers())})


def add_lora(network: ModelMixin, spec: Adapter, seed: int) -> ModelMixin:
    """Freeze ``network`` and give it trainable adapters; B starts at zero: the output is unchanged.

    Raises RecipeError if a name in ``spec.targets`` is that of no linear layer or convolution.
    """
    targets = layers_to_adapt(network, spec.targets)
    network.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network.add_adapter(
            LoraConfig(
                r=spec.rank,
                lora_alpha=spec.alpha,
                lora_dropout=spec.dropout,
                target_modules=targets,
                use_rslora=spec.rslora,
                use_dora=spec.dora,
            )
        )
        if spec.rank_schedule is not None:
            _draw_later_rows(network, spec.rank_schedule[0])
    if spec.dora:
        _declare_foreign_weights(network)
    else:
        add_in_one_product(network)
    return network


def _draw_later_rows(network: nn.Module, first_rank: int) -> None:
    """Rows of A that open later are Gaussian, as published, of the deviation of the first ones:
    Kaiming's uniform distribution on +-1 / sqrt(fan-in), as peft draws it.
    """
    for layer in network.modules():
        if isinstance(layer, LoraLayer):
            for part in layer.lora_A.values():
                fan_in = part.weight[0].numel()
                nn.init.normal_(part.weight.data[first_rank:], std=(3 * fan_in) ** -0.5)


def _declare_foreign_weights(network: nn.Module) -> None:
    """Tell ZeRO-3 that DoRA's module of magnitudes reads the weights of the layers around it."""
    for layer in network.modules():
        if isinstance(layer, LoraLayer):
            for name, magnitude in layer.lora_magnitude_vector.items():
                owners = (layer.get_base_layer(), layer.lora_A[name], layer.lora_B[name])
                for parameter in chain.from_iterable(owner.parameters() for owner in owners):
                    deepspeed.zero.register_external_parameter(magnitude, parameter)


def layers_to_adapt(network: nn.Module, targets: str | tuple[str, ...]) -> list[str]:
    """What peft is asked to adapt: whole names or suffixes, each of at least one layer."""
    layers = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    if targets == "all-linear":
        return [name for name, module in layers.items() if isinstance(module, nn.Linear)]
    suffixes = PRESETS[targets] if isinstance(targets, str) else targets
    matches = {suffix: [name for name in layers if _ends(name, suffix)] for suffix in suffixes}
    # peft knows suffixes, and no patterns.
    found = [
        name
        for suffix, names in matches.items()
        for name in (names if "*" in suffix else names and [suffix])
    ]
    # A preset is for many models, not all of which have all of its layers.
    missing = {suffix for suffix, names in matches.items() if not names}
    unmatched = set() if isinstance(targets, str) and found else missing
    if unmatched:
        raise RecipeError(
            f"adapter.targets: {', '.join(s for s in suffixes if s in unmatched)} matches no "
            "linear layer or convolution of the denoiser; there are "
            f"{', '.join(sorted({_suffix(name) for name in layers}))}, and the presets "
            f"{', '.join([*PRESETS, 'all-linear'])}",
            "adapter.targets",
            "unknown",
        )
    return found


def _ends(name: str, suffix: str) -> bool:
    pattern = re.escape(suffix).replace(r"\*", r"\d+")
    return re.search(rf"(^|\.){pattern}$", name) is not None


def _suffix(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def padded(value: Tensor, axis: int, rank: int) -> Tensor:
    """One side of a low-rank product, with zeros that make its rank, along ``axis``, that of
    others; the product is the same.
    """
    shape = list(value.shape)
    shape[axis] = rank - shape[axis]
    return torch.cat([value, value.new_zeros(shape)], dim=axis)
