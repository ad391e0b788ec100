"""Adapters in one product: equal to peft's own layer within what PyTorch loses, and fewer calls."""

import copy

import pytest
import torch
from cdpo.engine.models.adapters import add_lora
from cdpo.engine.models.low_rank import add_in_one_product
from cdpo.engine.recipe import Adapter
from operations import Operations
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

VIEWS = ("aten::t", "aten::view", "aten::_unsafe_view", "aten::detach", "aten::transpose")


def peft_layer(scale: float, *, bias: bool = True, dropout: float = 0.0) -> Linear:
    """Peft's own, of 24 to 40 numbers and rank 5, after some training."""
    torch.manual_seed(0)
    config = LoraConfig(r=5, lora_alpha=5 * scale, lora_dropout=dropout)
    layer = Linear(
        nn.Linear(24, 40, bias=bias).requires_grad_(False),
        "default",
        config,
        r=5,
        lora_alpha=5 * scale,
    )
    layer.lora_B["default"].weight.data.normal_()
    return layer


def in_one_product(layer: Linear) -> nn.Module:
    network = nn.Sequential(copy.deepcopy(layer))
    add_in_one_product(network)
    assert type(network[0]) is not Linear
    return network


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 7, 24).to(dtype).requires_grad_()


def step(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, and the gradients of the input and of what is trained."""
    torch.manual_seed(2)
    y = layer(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
    trained = [p for p in layer.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad((y * weights).sum(), [x, *trained])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("scale", "bias", "dropout"), [(1.0, True, 0.0), (0.3, False, 0.5)])
def test_it_is_as_exact_as_peft(dtype, scale, bias, dropout) -> None:
    peft = peft_layer(scale, bias=bias, dropout=dropout).to(dtype)
    ours = in_one_product(peft)
    # The mask of dropout is drawn in the dtype of the input: the truth is told without.
    if dropout:
        peft.lora_dropout["default"].p = ours[0].lora_dropout["default"].p = 0.0
    x = images(dtype)
    truths = step(copy.deepcopy(peft).double(), x.detach().double().requires_grad_())
    for found, other, truth in zip(step(ours, x), step(peft, x), truths, strict=True):
        assert found.dtype == other.dtype == dtype and found.shape == truth.shape
        lost = (other.double() - truth).norm()
        assert (found.double() - truth).norm() <= 2 * lost + 1e-7 * truth.norm()


@pytest.mark.parametrize("layout", ["whole", "channels", "slice"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fresh_it_is_the_layer_beneath_to_the_bit(dtype: torch.dtype, layout: str) -> None:
    """However the input lies: PyTorch adds the bias to rows in the product, and else afterwards."""
    network = in_one_product(peft_layer(0.3).to(dtype))
    network[0].lora_B["default"].weight.data.zero_()
    torch.manual_seed(1)
    x = {
        "whole": torch.randn(8, 16, 24, dtype=dtype),
        "channels": torch.randn(8, 24, 16, dtype=dtype).transpose(1, 2),  # as in SDXL's UNet
        "slice": torch.randn(8, 19, 24, dtype=dtype)[:, 3:],  # of text and image in one attention
    }[layout]
    assert x.is_contiguous() == (layout == "whole")
    with torch.no_grad():
        reference = network[0].base_layer(x)
    assert torch.equal(network(x.requires_grad_()), reference)


def test_dropout_draws_what_peft_draws() -> None:
    peft = peft_layer(0.3, dropout=0.5)
    for found, other in zip(
        step(in_one_product(peft), images()), step(peft, images()), strict=True
    ):
        torch.testing.assert_close(found, other)


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_three_calls_in_place_of_five(scale: float, operations: Operations) -> None:
    network = in_one_product(peft_layer(scale))
    x = images()
    with operations:
        y = network(x)
    assert [name for name in operations.names if name not in VIEWS] == [
        "aten::addmm",
        "aten::mm",
        "aten::addmm_",
    ]
    operations.names.clear()
    with operations:
        y.backward(torch.ones_like(y))
    scales = 0 if scale == 1 else 2  # of the gradients of x A and of B, and not of the output's
    assert sum("mul" in name for name in operations.names) == scales
    assert not any("copy" in name or "clone" in name for name in operations.names)


@pytest.mark.parametrize("way", ["autocast", "compiled", "checkpointed", "disabled", "channels"])
def test_it_computes_the_same_in_every_way(way: str) -> None:
    peft = peft_layer(0.3)
    ours = in_one_product(peft)
    x = images()
    if way == "channels":  # of a view that is not laid out in rows
        x = torch.randn(2, 24, 7).transpose(1, 2).requires_grad_()
    if way == "disabled":
        peft.enable_adapters(False)
        ours[0].enable_adapters(False)
        assert torch.equal(ours(x), peft(x))
        return
    run: nn.Module = ours
    if way == "compiled":
        run = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=False)
    if way == "checkpointed":
        found, other = (
            torch.autograd.grad(y.sum(), x)[0]
            for y in (checkpoint(ours, x, use_reentrant=False), ours(x))
        )
        assert torch.equal(found, other)
        return
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        found, other = step(run, x), step(peft, x)
    torch.compiler.reset()
    for one, two in zip(found, other, strict=True):
        assert one.dtype == two.dtype
        tolerance = 0.02 if way == "autocast" else 1e-5
        assert (one - two).norm() <= tolerance * two.norm()


def test_networks_with_adapters_have_it_and_names_and_dora_stay_as_peft_has_them(
    tiny_backbone,
) -> None:
    plain = copy.deepcopy(tiny_backbone.denoiser)
    dora = add_lora(copy.deepcopy(plain), Adapter(dora=True), seed=0)
    ours = add_lora(copy.deepcopy(plain), Adapter(targets="lcm"), seed=0)
    plain.requires_grad_(False)
    changed = [part for part in ours.modules() if isinstance(part, Linear)]
    assert changed and all(type(part) is not Linear for part in changed)
    assert all(type(part) is Linear for part in dora.modules() if isinstance(part, Linear))
    names = [name for name in ours.state_dict() if "lora_B" in name]
    assert all(name.endswith(".lora_B.default.weight") for name in names)


def test_products_in_place_are_counted_like_others() -> None:
    counts = []
    for network in (peft := nn.Sequential(peft_layer(0.3)), in_one_product(peft[0])):
        with FlopCounterMode(display=False) as counter:
            network(images()).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
