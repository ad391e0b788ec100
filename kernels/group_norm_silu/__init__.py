"""GroupNorm with SiLU in one."""

from .op import group_norm_silu

__all__ = ["group_norm_silu"]
