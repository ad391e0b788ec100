"""DeepSpeed's optimiser step in a handful of operations, one of which waits for the device.

Its own goes over what is trained tensor by tensor: once for what is not finite, once for the norm.
An adapter of SDXL has 1,120 tensors: 16,870 operations, while the device has nothing to do. It
looks at values three times. Here the gradients of a rank are put together first, as DeepSpeed does
after that anyway. The norm of the one tensor is read once, and it tells what is not finite: a sum
of squares passes on both NaN and infinity. It is summed in float64, as DeepSpeed's is, and rounded
where that rounds: the order of the sum is another one, which float32 does not show.

Left as they are: stage 3 with offload, whose gradients may lie on a disk, and optimisers that
DeepSpeed brings for ``data_types``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import (
    DeepSpeedZeroOptimizer,
    GradPartitionBufferGroup,
)
from torch import Tensor


def shorten_step(engine: deepspeed.DeepSpeedEngine) -> None:
    """Give the optimiser of an engine these methods in place of its own."""
    optimizer: Any = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer.has_overflow = _the_norm_tells
        optimizer.scaled_global_norm = partial(_norm_under_stages_1_and_2, optimizer)
        update = optimizer._update_model_bit16_weights
        optimizer._update_model_bit16_weights = partial(_point_into_flat, optimizer, update)
        if optimizer.cpu_offload:
            optimizer.update_offload_overflow_tracker = lambda gradient: None
            optimizer.set_norm_for_param_grad_in_gpu = lambda parameter: None
        if optimizer.overlap_comm and not get_accelerator().resolves_data_dependency():
            finish = optimizer.independent_gradient_partition_epilogue
            optimizer.independent_gradient_partition_epilogue = partial(
                _finish_reduction, optimizer, finish
            )
    elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3) and not optimizer.offload_optimizer:
        optimizer.has_overflow = _the_norm_tells
        optimizer._get_norm_groups = partial(_norm_under_stage_3, optimizer)


def _the_norm_tells(partition_gradients: bool = True) -> bool:
    """Whether gradients are not finite is not asked a second time."""
    return False


def _norm_under_stages_1_and_2(optimizer: Any, norm_type: int = 2) -> Tensor:
    """The norm of all ranks' gradients, float32 () in host memory; not finite if they are not."""
    squares = []
    for index, partition in enumerate(optimizer.single_partition_of_fp32_groups):
        flat = partition.grad if optimizer.cpu_offload else _flat_gradient(optimizer, index)
        squares.append(_square(flat))
    total = _sum_over_ranks(torch.stack(squares).sum().float(), optimizer)
    return total.cpu().sqrt()


def _flat_gradient(optimizer: Any, index: int) -> Tensor:
    """This rank's gradients of a group, which the step then takes as they are."""
    flat: Tensor | None = optimizer._get_preflattened_grad_partition(index)
    if flat is None:
        flat = optimizer.flatten(optimizer.averaged_gradients[index])
        optimizer.averaged_gradients[index] = GradPartitionBufferGroup([flat], flat)
    return flat


def _norm_under_stage_3(optimizer: Any) -> list[Tensor]:
    """The same for stage 3, float64, as a list of one."""
    squares = []
    for index, gradients in optimizer.averaged_gradients.items():
        flat = optimizer.flatten(gradients)
        optimizer.averaged_gradients[index] = [flat]
        squares.append(_square(flat))
    return [_sum_over_ranks(torch.stack(squares).sum(), optimizer).cpu().sqrt()]


def _square(flat: Tensor) -> Tensor:
    return torch.linalg.vector_norm(flat, dtype=torch.float64).square()


def _sum_over_ranks(value: Tensor, optimizer: Any) -> Tensor:
    value = value.to(get_accelerator().current_device_name(), non_blocking=True)
    dist.all_reduce(value, group=optimizer.dp_process_group)
    return value


def _point_into_flat(optimizer: Any, update: Any, index: int) -> None:
    """Make the parameters of a group views of its flat tensor, unless they are."""
    first, flat = optimizer.round_robin_bit16_groups[index][0], optimizer.bit16_groups_flat[index]
    if first.data_ptr() != flat.data_ptr():
        update(index)


def _finish_reduction(optimizer: Any, finish: Any) -> None:
    """The end of a backward pass whose gradients are reduced beside it: what follows on the device
    waits for them, and not the host.
    """
    optimizer.reduce_ipg_grads()
    get_accelerator().current_stream().wait_stream(optimizer.reduction_stream)
    optimizer._clear_previous_reduced_grads()
    optimizer.overlap_comm = False  # of which nothing is left but a wait of the host
    try:
        finish()
    finally:
        optimizer.overlap_comm = True
