"""What an adapter adds to a linear layer, in one matrix product: y += scale x A B.

Plain peft multiplies by B, then by the scale, then adds: three launches over the layer's whole
output, and one more for the scale on the way back. Here B's product is added to the output of the
frozen layer as it is made, which also rounds once in place of three times.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

# Counters of operations know the product that makes a new tensor, and not the one in place.
flop_registry[torch.ops.aten.addmm_] = flop_registry[torch.ops.aten.addmm]


def add_in_one_product(network: nn.Module) -> None:
    """Let every linear layer that has an adapter add it in one product.

    Layers get other classes, as the fused kernels do it: peft's names, parameters, hooks and its
    own ways with them (several adapters, none, merged ones) stay. Not for DoRA. Convolutions are
    left as they are.
    """
    layer: Any
    for layer in network.modules():
        if type(layer) is Linear:
            layer.__class__ = _AdaptedLinear
            for up in layer.lora_B.values():
                up.__class__ = _Up


class _AdaptedLinear(Linear):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = self.active_adapters
        if self.disable_adapters or self.merged or args or kwargs or names != [*self.lora_A]:
            return super().forward(x, *args, **kwargs)
        [name] = names
        # In rows, as the layers would lay it out themselves: their outputs are then no views, into
        # which nothing can be added without a copy of the gradient.
        rows = x.flatten(0, -2)
        # The reference's layer is given x as it lies. PyTorch adds the bias to rows in the product,
        # and on its own to what is not laid out in rows, rounding once more: asked otherwise than
        # that, the first step would not be log 2.
        onto = self.base_layer(rows if x.is_contiguous() else x).flatten(0, -2)
        hidden = self.lora_A[name](self.lora_dropout[name](rows))
        # As a call of the layer B, whose hooks gather its weight under ZeRO-3.
        added = self.lora_B[name](hidden, onto, self.scaling[name])
        return added.unflatten(0, x.shape[:-1])


class _Up(nn.Linear):
    """B of an adapter (out, r): called with hidden (N, r) alone, or to add to ``onto`` (N, out)."""

    def forward(self, input: Tensor, onto: Tensor | None = None, scale: float = 1.0) -> Tensor:
        if onto is None:
            return super().forward(input)
        # In place where it may be: on a GPU a new tensor costs a copy of ``onto`` first. It may not
        # under autocast, whose weights are still to be cast, nor on the views that ZeRO-3's hooks
        # return; a compiler decides for itself.
        mixed = self.weight.dtype != onto.dtype
        elsewhere = torch.compiler.is_compiling() or mixed or onto._is_view()
        add = onto.addmm if elsewhere else onto.addmm_
        return add(input, self.weight.t(), alpha=scale)
