"""What a step does, counted while it runs: floating-point operations, and calls of networks."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

# Dense bf16 without sparsity, TFLOP/s: the vendor's data sheets. What a large matrix product
# reaches is less, 790 on an H200.
NOMINAL_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H200": 989,
}


def _cpu_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _cpu_attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


# PyTorch's counter knows the attention kernels of GPUs only.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


def count_flops(compute: Callable[[], object]) -> int:
    """Operations of matrix products, convolutions and attention that a call executes."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        compute()
    return int(counter.get_total_flops())


@contextmanager
def counted_calls(networks: Mapping[str, nn.Module]) -> Iterator[dict[str, list[int]]]:
    """While it is open: for each network that is called, the images or prompts of each call."""
    calls: dict[str, list[int]] = {}
    with ExitStack() as hooks:
        for name, network in networks.items():

            def note(
                _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name
            ) -> None:
                first = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
                calls.setdefault(name, []).append(len(first))

            handle = network.register_forward_pre_hook(note, with_kwargs=True)
            hooks.callback(handle.remove)
        yield calls
