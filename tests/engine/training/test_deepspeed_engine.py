"""DeepSpeed's linear layers of ZeRO-3 round as PyTorch's, and are for its own weights alone."""

import pytest
import torch
from cdpo.engine.training.deepspeed_engine import linear
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn
from torch.nn import functional

PLAIN = functional.linear


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "rows": torch.randn(16, 24, dtype=dtype),
        "batch": torch.randn(8, 16, 24, dtype=dtype),
        "strided": torch.randn(8, 24, 16, dtype=dtype).transpose(1, 2),
    }


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_partitioned_weights_give_what_whole_ones_do(dtype: torch.dtype, bias: bool) -> None:
    layer = nn.Linear(24, 40, bias=bias).to(dtype).requires_grad_(False)
    for how, x in inputs(dtype).items():
        x.requires_grad_()
        wanted = PLAIN(x, layer.weight, layer.bias)
        layer.weight.ds_id, layer.weight.ds_status = 0, ZeroParamStatus.AVAILABLE
        found = linear(PLAIN, zero3_linear_wrap, x, layer.weight, layer.bias)
        del layer.weight.ds_id
        assert torch.equal(found, wanted), how
        given = torch.ones_like(wanted)
        assert torch.equal(*(torch.autograd.grad(y, x, given)[0] for y in (found, wanted))), how


def test_whole_weights_are_not_deepspeeds() -> None:
    layer = nn.Linear(24, 40)
    x = torch.randn(2, 3, 24)
    assert torch.equal(linear(PLAIN, pytest.fail, x, layer.weight, layer.bias), layer(x))
