"""Stand-ins for layers of diffusers' networks, to be put in place by class alone (see `fuse.py`).

Each subclasses the layer it stands for, has its parameters and buffers, and adds no state.
"""

from typing import Any

from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from .geglu import geglu
from .group_norm_silu import group_norm_silu


class FusedGroupNorm(nn.GroupNorm):
    """GroupNorm that reads and writes channels-last."""

    def forward(self, input: Tensor) -> Tensor:
        return group_norm_silu(input, self.num_groups, self.weight, self.bias, self.eps, silu=False)


class FusedGroupNormSiLU(nn.GroupNorm):
    """GroupNorm and the SiLU that follows it."""

    def forward(self, input: Tensor) -> Tensor:
        return group_norm_silu(input, self.num_groups, self.weight, self.bias, self.eps)


class FusedResnetBlock2D(ResnetBlock2D):
    """A residual block of a UNet or VAE whose norms activate as well.

    For blocks without resampling that add the time embedding before the second norm. Unlike the
    original it leaves the input of the shortcut channels-last in training, and does not divide by
    an output scale of 1: two copies and one pass over the hidden states less.
    """

    def forward(
        self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        hidden_states = self.conv1(self.norm1(input_tensor))
        if self.time_emb_proj is not None:
            temb = temb if self.skip_time_act else self.nonlinearity(temb)
            temb = self.time_emb_proj(temb)[:, :, None, None]
        if temb is not None:
            hidden_states = hidden_states + temb
        hidden_states = self.conv2(self.dropout(self.norm2(hidden_states)))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        output = input_tensor + hidden_states
        return output if self.output_scale_factor == 1 else output / self.output_scale_factor


class AlreadyActivated(nn.SiLU):
    """A SiLU whose input comes activated from the fused norm."""

    def forward(self, input: Tensor) -> Tensor:
        return input


class FusedGEGLU(GEGLU):
    """Projection and gated GELU; the projection may bear an adapter."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return geglu(self.proj(hidden_states))
