"""Starting DeepSpeed: our optimiser, buckets of the right size, no compiler at first launch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import AsyncIOBuilder
from torch import nn

from .averaging import AveragingAdamW
from .basics.errors import RecipeError
from .recipe import Optimizer


def start_engine(
    module: nn.Module,
    config: dict[str, Any],
    spec: Optimizer,
    device: torch.device,
    ema: float | None = None,
) -> deepspeed.DeepSpeedEngine:
    """Hand ``module`` to DeepSpeed; what requires no gradient stays out of the optimiser.

    With ``ema``, a decay, the optimiser keeps a moving average of what it trains.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW if ema is None else partial(AveragingAdamW, decay=ema)
    optimizer = adamw(
        trainable,
        lr=spec.lr,
        betas=spec.betas,
        eps=spec.eps,
        weight_decay=spec.weight_decay,
        fused=device.type == "cuda",
    )
    _skip_shared_memory_build(device)
    _take_fp16_on_cpu(device)
    _check_disk(config)
    _fit_bucket(config, sum(p.numel() for p in trainable))
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=config, dist_init_required=False
    )
    return engine


def _fit_bucket(config: dict[str, Any], trainable: int) -> None:
    """Cap ZeRO's reduction bucket at the gradients there are.

    It is allocated whole, and its default of 5e8 elements is more memory than all the training
    state of most adapters.
    """
    zero = config.setdefault("zero_optimization", {})
    zero["reduce_bucket_size"] = min(int(zero.get("reduce_bucket_size", 5e8)), max(trainable, 1))


def _skip_shared_memory_build(device: torch.device) -> None:
    """Keep DeepSpeed from compiling its shared-memory helper for CPU ranks at first launch.

    It takes a C++ compiler and a minute, hangs on the lock of a build that was killed, and speeds
    up only large all-reduces among many ranks of one machine.
    """
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _take_fp16_on_cpu(device: torch.device) -> None:
    """Let fp16 recipes run on CPUs, for tests: slowly, in PyTorch's own kernels.

    DeepSpeed refuses them where oneDNN has no fp16 instructions to use.
    """
    if device.type == "cpu":
        get_accelerator().is_fp16_supported = lambda: True


def _check_disk(config: dict[str, Any]) -> None:
    """RecipeError if the config offloads to a disk and this machine cannot."""
    for section in ("offload_optimizer", "offload_param"):
        offload = config["zero_optimization"].get(section) or {}
        if offload.get("device") != "nvme":
            continue
        folder = offload.get("nvme_path")
        if folder is None or not Path(folder).is_dir():
            raise RecipeError(
                f"zero_optimization.{section}.nvme_path={folder} is no folder of this machine: "
                "copy the DeepSpeed JSON and name one on a local disk"
            )
        if not AsyncIOBuilder().is_compatible(verbose=False):
            raise RecipeError(
                f"zero_optimization.{section}.device=nvme needs libaio with its headers, from "
                "which DeepSpeed builds its reader: apt install libaio-dev"
            )
