"""Attention kernels for a denoiser's transformer blocks: which there are, and putting one in.

PyTorch's own (`sdpa`) is what diffusers uses, and it picks among its kernels by its version, the
device and the environment. `cudnn`, `flash` and `xformers` replace the processor of every plain
attention layer; the VAE keeps PyTorch's, its one head is too wide for any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ..basics.errors import RecipeError, told_by

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(query (N, S, H, d), key (N, T, H, d), value (N, T, H, d)) -> (N, S, H, d): N images, S and T
tokens, H heads of width d."""

# Kernels of other packages: module and function, and what to install.
PACKAGES = {
    "flash": ("flash_attn", "flash_attn_func", "pip install --no-build-isolation 'cdpo[flash]'"),
    "xformers": ("xformers.ops", "memory_efficient_attention", "pip install 'cdpo[xformers]'"),
}
# Compute capabilities where others measured cuDNN's kernel ahead of FlashAttention 2, forward and
# backward: Hopper, and Blackwell for data centers. On an A100, an L40S and Blackwell for
# workstations (12.0) it was behind or no faster. A rule and no timing: what a timing decides may
# differ from start to start, and a resumed run with it.
CUDNN_WINS = ((9, 0), (10, 0))
CUDNN_DTYPES = (torch.bfloat16, torch.float16)
CUDNN_WIDTH = 128  # of its heads at most, in steps of 8; wider ones not backward on every release
PROBE_TOKENS = 77  # the odd length that text has, so that padding is tried as well


class ProjectedAttention:
    """A diffusers attention processor: projections, then a kernel that takes heads next to width.

    For attention without mask, norms of its own, or residual: that of a UNet's transformer blocks.
    """

    def __init__(self, attend: Attend) -> None:
        self.attend = attend

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **ignored: Any,
    ) -> Tensor:
        assert attention_mask is None, "latents and padded prompts are attended to without a mask"
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            projected.unflatten(-1, (attn.heads, -1))
            for projected in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        attended = self.attend(query, key, value).flatten(2)
        project, dropout = attn.to_out
        return dropout(project(attended))


def cudnn_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """:data:`Attend` by cuDNN, and by PyTorch's choice where the shapes are not for it."""
    tokens, width = min(query.shape[1], key.shape[1]), query.shape[-1]
    needs_backward = query.requires_grad or key.requires_grad or value.requires_grad
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    if width > CUDNN_WIDTH or tokens < 2:
        return scaled_dot_product_attention(query, key, value).transpose(1, 2)
    # The operator itself: PyTorch's context to choose it costs the host more than the call.
    attended: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, needs_backward and torch.is_grad_enabled()
    )[0]
    return attended.transpose(1, 2)


def use_attention(network: nn.Module, attend: Attend) -> None:
    """Let every plain attention layer of ``network`` run through ``attend``."""
    for layer in _plain_layers(network):
        layer.set_processor(ProjectedAttention(attend))


def choose_attention(
    wanted: Literal["auto", "sdpa", "cudnn", "xformers", "flash"],
    network: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[str, Attend | None]:
    """The kernel to use and its name; None stands for diffusers' own, over PyTorch's.

    ``auto`` takes the first of cudnn (where it wins), flash, xformers and sdpa that imports and
    computes the widths of this network's heads forward and backward on this device; on a CPU sdpa.

    Raises:
        RecipeError: if the one that was asked for does not.
    """
    widths = {layer.inner_dim // layer.heads for layer in _plain_layers(network)}
    nothing_to_choose = device.type != "cuda" or not widths
    if wanted == "sdpa" or (wanted == "auto" and nothing_to_choose):
        return "sdpa", None
    if not widths:
        raise RecipeError(
            f"speed.attention={wanted} has no effect on a {type(network).__name__}, whose layers "
            "stay as diffusers has them: use auto or sdpa",
            "speed.attention",
            "no-effect",
        )
    of_auto = (*["cudnn"] * _cudnn_wins(device, dtype), *PACKAGES)
    for name in of_auto if wanted == "auto" else (wanted,):
        try:
            attend = _import(name)
            for width in sorted(widths):
                _try(attend, width, device, dtype)
        except ImportError as error:
            if wanted != "auto":
                raise RecipeError(
                    f"speed.attention={name}: {told_by(error)}. Install it with "
                    f"{PACKAGES[name][2]}, or use auto",
                    "speed.attention",
                    "not-installed",
                ) from None
        except (RuntimeError, ValueError, NotImplementedError) as error:
            if wanted != "auto":
                raise RecipeError(
                    f"speed.attention={name} does not work with {dtype} on {device.type} "
                    f"({told_by(error)}): use auto or sdpa",
                    "speed.attention",
                    "unsupported",
                ) from None
        else:
            return name, attend
    return "sdpa", None


def _plain_layers(network: nn.Module) -> Iterator[Attention]:
    """Attention layers that do no more than :class:`ProjectedAttention` does."""
    for layer in network.modules():
        if isinstance(layer, Attention):
            norms = (layer.group_norm, layer.spatial_norm, layer.norm_q, layer.norm_k)
            extras = layer.norm_cross or layer.residual_connection or layer.added_kv_proj_dim
            scales = layer.scale_qk and layer.rescale_output_factor == 1
            # Other processors compute something else: SANA's linear attention, or with a mask.
            plain = isinstance(layer.processor, AttnProcessor2_0 | ProjectedAttention)
            if plain and scales and not any(norms) and not extras:
                yield layer


def _cudnn_wins(device: torch.device, dtype: torch.dtype) -> bool:
    return dtype in CUDNN_DTYPES and torch.cuda.get_device_capability(device) in CUDNN_WINS


def _import(name: str) -> Attend:
    if name == "cudnn":
        return cudnn_attention
    module, function, _ = PACKAGES[name]
    attend: Attend = getattr(import_module(module), function)
    return attend


def _try(attend: Attend, width: int, device: torch.device, dtype: torch.dtype) -> None:
    """One small forward and backward; whatever the kernel does not take it says by raising."""
    query, key, value = (
        torch.ones(1, PROBE_TOKENS, 2, width, device=device, dtype=dtype, requires_grad=True)
        for _ in range(3)
    )
    attended = attend(query, key, value)
    attended.sum().backward()
    if attended.shape != query.shape or not bool((attended - 1).abs().max() < 0.01):
        raise RuntimeError(f"its mean of ones is not one at head width {width}")
