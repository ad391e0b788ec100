"""Memory and speed knobs, applied to finished networks from outside; the `speed` of a recipe.

None of them changes what is computed beyond the rounding of float arithmetic. The frozen networks
get whatever the policy gets: rounded differently they would give a fresh adapter a margin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ...kernels import use as use_kernels
from ...kernels.dispatch import INTERPRETED
from ...kernels.fuse import fuse
from ..basics.errors import RecipeError, told_by
from ..recipe import Recipe, Speed
from .attention import Attend, choose_attention, use_attention
from .protocol import Backbone

# Compilations of one block: its sizes in a UNet, with gradient and without. Dynamo's own limit of
# eight would leave the rest of the blocks as they are, without a word.
MOST_COMPILATIONS = 128
# Sizes never change in a training run. Rounding is that of eager PyTorch: policy and reference are
# other graphs (adapters, gradients), and what inductor rounds later in one of them than in the
# other makes step-0 logits of 2 in bf16, where a fresh adapter must give 0.
COMPILE: dict[str, Any] = {"dynamic": False, "options": {"emulate_precision_casts": True}}


@dataclass(frozen=True)
class Tuning:
    """The knobs of a recipe, decided for a device: no `auto` is left."""

    channels_last: bool
    fused_kernels: bool
    attention: str
    attend: Attend | None
    compile: str
    activation_checkpointing: bool
    offload_encoders: bool
    prompt_cache_mib: int
    free_rounding: bool
    pieces: int = 0
    """Least number of graphs that compilation will make of the networks it was applied to."""

    def __str__(self) -> str:
        """What is on, as a line for people: `channels_last, fused kernels, attention sdpa`."""
        words = {
            "channels_last": self.channels_last,
            "fused kernels": self.fused_kernels,
            f"attention {self.attention}": True,
            f"compile {self.compile}": self.compile != "off",
            "rounding free": self.free_rounding,
            "activation checkpointing": self.activation_checkpointing,
            "encoders offloaded": self.offload_encoders,
        }
        return ", ".join(word for word, is_on in words.items() if is_on)


def choose_tuning(
    spec: Speed,
    denoiser: ModelMixin,
    device: torch.device,
    *,
    training: bool = False,
) -> Tuning:
    """Decide what `auto` means here, and refuse what does not work here.

    Args:
        spec: the recipe's section.
        denoiser: the network to be tuned; its arithmetic and the widths of its attention heads
            decide which kernels take it.
        device: where it computes.
        training: where the network is only sampled from, what is for training alone is left out:
            compilation, checkpointing and free rounding.

    Raises:
        RecipeError: one line that names the knob, and what would work.
    """
    on_gpu = device.type == "cuda"
    if training and spec.compile != "off":
        _check_compiler(spec.compile, device)
    attention, attend = choose_attention(
        spec.attention, denoiser, device, next(denoiser.parameters()).dtype
    )
    return Tuning(
        channels_last=is_on(spec.channels_last, on_gpu),
        fused_kernels=is_on(spec.fused_kernels, on_gpu),
        attention=attention,
        attend=attend,
        compile=spec.compile if training else "off",
        activation_checkpointing=training and spec.activation_checkpointing,
        offload_encoders=spec.encoders == "offload",
        prompt_cache_mib=spec.prompt_cache_mib,
        # What is drawn and scored decides ranks: candidates of two sittings must be the same.
        free_rounding=training and spec.rounding == "free",
    )


def tune_for_training(
    recipe: Recipe,
    backbone: Backbone,
    policy: ModelMixin,
    frozen: Sequence[nn.Module],
) -> Tuning:
    """All that is done to networks before DeepSpeed wraps them, and what that was.

    To be called when adapters are in place, and before hooks know the layers: fused ones are of
    other classes. What is left is :func:`order_weights`.

    Args:
        recipe: its knobs are those of `speed`, and `train.kernels`.
        backbone: its VAE and text encoders are tuned as for sampling.
        policy: what trains; it alone keeps no activations, if the recipe says so.
        frozen: reference and teacher, which may share the policy's parameters.

    Raises:
        RecipeError: for knobs that do not work here; nothing is tuned yet.
    """
    tuning = choose_tuning(recipe.speed, policy, backbone.device, training=True)
    _choose_kernels(recipe.train.kernels, backbone.device)
    _tune_frozen_parts(backbone, tuning)
    if tuning.activation_checkpointing:
        policy.enable_gradient_checkpointing()
    pieces: set[object] = set()
    for network in (policy, *frozen):
        _tune(network, tuning)
        if tuning.compile != "off":
            kinds = _compile(network, regional=tuning.compile == "regional")
            # Frozen networks of one shape share their graphs.
            pieces |= {(network is policy, kind) for kind in kinds}
    return replace(tuning, pieces=len(pieces))


def order_weights(tuning: Tuning, network: nn.Module, *frozen: nn.Module) -> None:
    """Give convolutions the memory order of their images, or each call would copy their weights.

    To be called when DeepSpeed has wrapped the networks: it broadcasts weights in PyTorch's own
    order alone. What trains keeps that order, for ZeRO lays it out flat, and so does a frozen copy
    of it, which must compute alike; ZeRO-3 lays out everything flat.
    """
    trained = {name for name, weight in network.named_parameters() if weight.requires_grad}
    for part in (network, *frozen) if tuning.channels_last else ():
        for name, weight in part.named_parameters():
            if weight.ndim == 4 and name not in trained and not hasattr(weight, "ds_id"):
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def tune_for_sampling(spec: Speed, backbone: Backbone) -> None:
    """What is safe where images are drawn: all but compilation. RecipeError as `choose_tuning`."""
    _tune_frozen_parts(backbone, tune_denoiser(spec, backbone))


def tune_denoiser(spec: Speed, backbone: Backbone) -> Tuning:
    """The same of the denoiser alone, for one that was put in place of another."""
    tuning = choose_tuning(spec, backbone.denoiser, backbone.device)
    _tune(backbone.denoiser, tuning)
    order_weights(tuning, backbone.denoiser)
    return tuning


@contextmanager
def rounding(tuning: Tuning) -> Iterator[None]:
    """Within, a process takes the convolutions that were fastest in a trial, and TF32 for matrix
    products of float32, if that is tuned; afterwards what it took before.
    """
    if not tuning.free_rounding:
        yield
        return
    # The older of PyTorch's two names: it keeps both in step. Once the newer,
    # `matmul.fp32_precision`, has been set, whoever reads the older gets an error, inductor of some
    # releases among them. `set_float32_matmul_precision` would set the CPU's as well.
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, matmul.allow_tf32
    try:
        cudnn.benchmark = matmul.allow_tf32 = True
        yield
    finally:
        cudnn.benchmark, matmul.allow_tf32 = before


@contextmanager
def uncompiled(networks: nn.Module) -> Iterator[None]:
    """Run networks as they were written: for samples, whose sizes are not those of training."""
    compiled = {part: part._compiled_call_impl for part in networks.modules()}
    compiled = {part: call for part, call in compiled.items() if call is not None}
    try:
        for part in compiled:
            part._compiled_call_impl = None
        yield
    finally:
        for part, call in compiled.items():
            part._compiled_call_impl = call


def offload(part: nn.Module, calls: Iterable[str], device: torch.device) -> None:
    """Keep a frozen network in host memory; it is on ``device`` only while one of ``calls`` runs.

    Args:
        part: a text encoder or a VAE.
        calls: names of the methods that are called from outside, such as `forward` or `decode`.
        device: where they compute, whatever device their arguments are on.
    """
    part.to("cpu")
    for name in calls:
        setattr(part, name, partial(_visit, part, getattr(part, name), device))


def _visit(
    part: nn.Module, call: Callable[..., Any], device: torch.device, *args: Any, **kwargs: Any
) -> Any:
    def brought(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    try:
        part.to(device)
        return call(*map(brought, args), **{name: brought(v) for name, v in kwargs.items()})
    finally:
        part.to("cpu")


def is_on(knob: str, on_gpu: bool) -> bool:
    """What a knob of `auto`, `on` or `off` that is for GPUs means on this device."""
    return knob == "on" or (knob == "auto" and on_gpu)


def _tune(network: nn.Module, tuning: Tuning) -> None:
    """Fused layers, attention and order of images; again it changes nothing."""
    if tuning.fused_kernels:
        fuse(network)
    if tuning.attend is not None:
        use_attention(network, tuning.attend)
    if tuning.channels_last:
        _order_images(network)


def _tune_frozen_parts(backbone: Backbone, tuning: Tuning) -> None:
    """Tune the VAE, let it and the text encoders wait where the recipe says, and bound the memory
    of encoded prompts.
    """
    backbone.limit_prompt_cache(tuning.prompt_cache_mib * 2**20)
    pipeline = backbone.pipeline
    _tune(pipeline.vae, tuning)
    order_weights(tuning, pipeline.vae)
    if tuning.offload_encoders:
        offload(pipeline.vae, ("encode", "decode"), backbone.device)
        for name, part in pipeline.components.items():
            if name.startswith("text_encoder") and part is not None:
                offload(part, ("forward",), backbone.device)


def _order_images(network: nn.Module) -> None:
    """Give the network channels-last images; what it computes from them stays in that order."""
    inputs: list[Any] = [network]
    for block in network.modules():
        # In training alone this block of diffusers makes the input of its shortcut contiguous: the
        # policy would round differently than its reference, which is not in training.
        if type(block) is ResnetBlock2D and block.conv_shortcut is not None:
            inputs.append(block.conv_shortcut)
    for part in inputs:
        if _reorder_images not in part._forward_pre_hooks.values():
            part.register_forward_pre_hook(_reorder_images)


def _reorder_images(network: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        arg.contiguous(memory_format=torch.channels_last)
        if isinstance(arg, Tensor) and arg.ndim == 4
        else arg
        for arg in args
    )


def _compile(network: nn.Module, *, regional: bool) -> set[object]:
    """In place, and not as torch.compile(network): names in checkpoints and exports stay.

    Returns what tells those parts apart that are sure to be graphs of their own: their class and
    the shapes of their weights.
    """
    torch._dynamo.config.recompile_limit = MOST_COMPILATIONS
    parts = _repeated_blocks(network) if regional else [network]
    for part in parts:
        part.compile(**COMPILE)
    return {(type(part), tuple(p.shape for p in part.parameters())) for part in parts}


def _repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """What a network is made of again and again: of a UNet the two kinds of its layers, of a
    transformer all that it holds in lists.
    """
    kinds = (BasicTransformerBlock, ResnetBlock2D)
    layers = [part for part in network.modules() if isinstance(part, kinds)]
    lists = [part for part in network.children() if isinstance(part, nn.ModuleList)]
    return layers or [block for blocks in lists for block in blocks]


def _check_compiler(mode: str, device: torch.device) -> None:
    """Compile something small: a missing C++ compiler or Triton is found before any work is."""
    try:
        torch.compile(_something_small)(torch.ones(8, device=device))
    except Exception as error:  # dynamo and inductor have no common base for what can go wrong
        raise RecipeError(
            f"speed.compile={mode}: torch.compile does not work here ({told_by(error)}): use off",
            "speed.compile",
            "unsupported",
        ) from None


def _something_small(x: Tensor) -> Tensor:
    return (x * 2).sin().sum()


def _choose_kernels(mode: str, device: torch.device) -> None:
    """Have our kernels compute as ``train.kernels`` says; RecipeError if this device cannot."""
    if mode == "triton" and device.type != "cuda" and not INTERPRETED:
        raise RecipeError(
            "train.kernels=triton needs a CUDA device: use auto or torch on a CPU, or start with "
            "TRITON_INTERPRET=1 to run the kernels there in Triton's interpreter, slowly",
            "train.kernels",
            "unsupported",
        )
    try:
        use_kernels(mode)
    except RuntimeError as error:
        raise RecipeError(
            f"train.kernels={mode}: {told_by(error)}", "train.kernels", "not-installed"
        ) from None
