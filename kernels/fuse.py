"""Puts the fused kernels into a diffusers UNet or VAE from outside, and takes them out again.

A layer is replaced by giving it another class (see `fused_modules.py`): parameters, buffers, names,
hooks and whatever refers to the layer stay, so state-dict keys, adapters, optimizers and ZeRO
partitions do not notice, whether they came before or come after.
"""

from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def fuse(module: Module) -> Module:
    """Let every GroupNorm, GroupNorm → SiLU and GEGLU in `module` run as one kernel; returns it.

    Norms followed by SiLU are those of diffusers' ResnetBlock2D and those before the last
    convolution of a UNet and of a VAE's encoder and decoder. The kernels work channels-last: move
    the network there, `module.to(memory_format=torch.channels_last)`, or each norm copies its
    input. Already fused layers stay as they are, and so do networks that hold none of these, such
    as transformers. Raises ValueError if hooks have replaced the forward of a layer.
    """
    _give_classes(module, list(_swaps(module)))
    return module


def unfuse(module: Module) -> Module:
    """Undo `fuse` on the module that was given to it; returns the module."""
    originals = _originals()
    fused = [part for part in module.modules() if type(part) in originals]
    _give_classes(module, [(part, originals[type(part)]) for part in fused])
    return module


def _give_classes(module: nn.Module, swaps: list["Swap"]) -> None:
    """All or none: a layer whose forward was replaced on the instance would not notice."""
    names = {id(part): name for name, part in module.named_modules()}
    held = [names[id(part)] or type(part).__name__ for part, _ in swaps if "forward" in vars(part)]
    if held:
        raise ValueError(
            f"{held[0]} ({len(held)} layers in all) has a forward of its own, put there by hooks "
            "such as accelerate's offloading: fuse and unfuse before they are attached"
        )
    for part, cls in swaps:
        part.__class__ = cls


Swap = tuple[nn.Module, type[nn.Module]]  # a layer and the class it is to get


def _originals() -> dict[type[nn.Module], type[nn.Module]]:
    from . import fused_modules as fused  # here, for it takes seconds to import diffusers

    return {
        fused.FusedGroupNorm: nn.GroupNorm,
        fused.FusedGroupNormSiLU: nn.GroupNorm,
        fused.FusedResnetBlock2D: fused.ResnetBlock2D,
        fused.AlreadyActivated: nn.SiLU,
        fused.FusedGEGLU: fused.GEGLU,
    }


def _swaps(module: nn.Module) -> Iterator[Swap]:
    from . import fused_modules as fused

    activating = [swap for part in module.modules() for swap in _activating_norms(part)]
    yield from activating
    seen = {id(part) for part, _ in activating}
    for part in module.modules():
        if _is_norm(part) and id(part) not in seen:
            yield part, fused.FusedGroupNorm
        elif type(part) is fused.GEGLU:
            yield part, fused.FusedGEGLU


def _activating_norms(part: Any) -> list[Swap]:
    """Norms of `part` that a SiLU follows, and the layer that will no longer apply that SiLU."""
    from . import fused_modules as fused

    if type(part) is fused.ResnetBlock2D:
        norms, activation = [part.norm1, part.norm2], part.nonlinearity
        swap: tuple[Any, type[nn.Module]] = part, fused.FusedResnetBlock2D
        resampling = part.upsample is not None or part.downsample is not None
        # With `scale_shift` the time embedding comes between the second norm and its SiLU.
        fits = part.time_embedding_norm == "default" and not resampling
    else:
        norms, activation = [getattr(part, "conv_norm_out", None)], getattr(part, "conv_act", None)
        swap, fits = (activation, fused.AlreadyActivated), True
    fits &= type(activation) is nn.SiLU and all(_is_norm(norm) for norm in norms)
    return [swap, *((norm, fused.FusedGroupNormSiLU) for norm in norms)] if fits else []


def _is_norm(part: Any) -> bool:
    """A GroupNorm with weight and bias, or with neither: what the kernel takes."""
    return type(part) is nn.GroupNorm and (part.weight is None) == (part.bias is None)
