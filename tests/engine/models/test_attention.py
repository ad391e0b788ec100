"""Attention kernels of other packages, which no CPU has: stand-ins with their signatures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
import tiny
import torch
from cdpo.engine.basics.errors import RecipeError
from cdpo.engine.models.attention import Attend, choose_attention, cudnn_attention, use_attention
from diffusers import UNet2DConditionModel
from refusals import refused
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def heads_next_to_width(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What flash_attn_func and memory_efficient_attention compute: (N, S, H, d) in and out."""
    inputs = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return scaled_dot_product_attention(*inputs).transpose(1, 2)


def refusing(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nmore")


def averaging_nothing(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return query * 0


@pytest.fixture
def install(monkeypatch) -> Callable[..., None]:
    """Put stand-ins for the packages in place: flash, xformers, or neither."""

    def install(flash: Attend | None = None, xformers: Attend | None = None) -> None:
        packages = {
            "flash_attn": ("flash_attn_func", flash),
            "xformers.ops": ("memory_efficient_attention", xformers),
        }
        for name, (function, attend) in packages.items():
            module = ModuleType(name)
            setattr(module, function, attend)
            monkeypatch.setitem(sys.modules, name, module if attend else None)
        monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))

    return install


@pytest.fixture
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return tiny.unet().requires_grad_(False).eval()


def predict(unet: UNet2DConditionModel) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 5, 16, generator=generator)
    return unet(noisy, 500, encoder_hidden_states=text, return_dict=False)[0]


def test_the_processor_computes_what_diffusers_own_does(unet) -> None:
    before = predict(unet)
    use_attention(unet, heads_next_to_width)
    used = {type(processor).__name__ for processor in unet.attn_processors.values()}
    assert used == {"ProjectedAttention"}
    torch.testing.assert_close(predict(unet), before, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("network", [lambda: tiny.pipeline().vae, lambda: tiny.sana()])
def test_layers_that_compute_something_else_keep_their_processor(network) -> None:
    """A VAE's have norms; SANA's attend linearly to the image, and with a mask to the text."""
    made = network()
    before = list(made.attn_processors.values())
    use_attention(made, heads_next_to_width)
    assert before and list(made.attn_processors.values()) == before


def of_math(*inputs: Any) -> tuple[Tensor]:
    """What the operator gives first; the others are for its own backward pass."""
    *tensors, mask, for_backward = inputs
    assert mask is None and for_backward == tensors[0].requires_grad
    return (scaled_dot_product_attention(*tensors),)


@pytest.mark.parametrize(
    ("width", "tokens", "by_cudnn"), [(40, 77, 1), (128, 2, 1), (160, 64, 0), (64, 1, 0)]
)
def test_cudnn_computes_what_it_takes_and_pytorch_the_rest(
    monkeypatch, width: int, tokens: int, by_cudnn: int
) -> None:
    operator = Mock(side_effect=of_math)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", operator)
    query, key = torch.randn(2, 9, 3, width), torch.randn(2, tokens, 3, width)
    for wants_gradient in (False, True):
        query.requires_grad_(wants_gradient)
        attended = cudnn_attention(query, key, key)
        torch.testing.assert_close(attended, heads_next_to_width(query, key, key))
        with torch.no_grad():
            cudnn_attention(query.detach(), key, key)
    assert operator.call_count == 4 * by_cudnn


def test_the_operator_of_cudnn_is_called_as_pytorch_declares_it() -> None:
    """Shapes and backward pass without a GPU; a release that declares another is found here."""
    query, key = (
        torch.empty(2, n, 3, 40, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for n in (64, 77)
    )
    attended = cudnn_attention(query, key, key)
    assert attended.shape == query.shape and attended.is_contiguous()
    attended.sum().backward()
    assert query.grad.shape == query.shape and key.grad.shape == key.shape


def choose(wanted: str, unet: UNet2DConditionModel, device: torch.device = CPU) -> str:
    return choose_attention(wanted, unet, device, torch.float32)[0]


def test_what_was_asked_for_is_tried_and_taken(unet, install) -> None:
    install(flash=heads_next_to_width, xformers=heads_next_to_width)
    for name in ("flash", "xformers"):
        chosen, attend = choose_attention(name, unet, CPU, torch.float32)
        assert (chosen, attend) == (name, heads_next_to_width)
    assert choose_attention("sdpa", unet, CPU, torch.float32) == ("sdpa", None)


@pytest.mark.parametrize("name", ["flash", "xformers"])
def test_a_missing_package_is_one_line_with_the_command(unet, install, name) -> None:
    install()
    told = refused(RecipeError, "not-installed", "speed.attention", wording=f"without-{name}")
    with told:
        choose(name, unet)


@pytest.mark.parametrize("kernel", [refusing, averaging_nothing])
def test_a_kernel_that_does_not_work_here_is_refused(unet, install, kernel) -> None:
    install(flash=kernel)
    with refused(RecipeError, "unsupported", "speed.attention") as told:
        choose("flash", unet)
    assert "\n" not in str(told.value)


@pytest.fixture
def on_a_gpu(monkeypatch) -> Callable[[tuple[int, int]], None]:
    """As on a GPU of a compute capability: the probe's tensors are made on the CPU instead."""
    ones, operator = torch.ones, "_scaled_dot_product_cudnn_attention"
    monkeypatch.setattr(torch, "ones", lambda *a, **k: ones(*a, **{**k, "device": CPU}))
    monkeypatch.setattr(torch.ops.aten, operator, of_math)
    return lambda own: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: own)


@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [
        ((8, 0), torch.bfloat16, "flash"),
        ((8, 9), torch.float16, "flash"),
        ((9, 0), torch.bfloat16, "cudnn"),
        ((9, 0), torch.float16, "cudnn"),
        ((9, 0), torch.float32, "flash"),
        ((10, 0), torch.bfloat16, "cudnn"),
        ((12, 0), torch.bfloat16, "flash"),
    ],
)
def test_cudnn_comes_first_where_it_wins(
    unet, install, on_a_gpu, capability, dtype, expected
) -> None:
    on_a_gpu(capability)
    install(flash=heads_next_to_width)
    for _ in range(2):  # by a rule, and so the same at each start
        assert choose_attention("auto", unet, CUDA, dtype)[0] == expected


@pytest.mark.parametrize("pipeline", [tiny.sd3_pipeline, tiny.flux_pipeline])
def test_transformers_have_no_layer_to_choose_for(pipeline, install, on_a_gpu) -> None:
    on_a_gpu((9, 0))
    install(flash=heads_next_to_width)
    assert choose("auto", pipeline().transformer, CUDA) == "sdpa"
    with refused(RecipeError, "no-effect", "speed.attention"):
        choose("cudnn", pipeline().transformer)


def test_auto_takes_the_first_that_works(unet, install, on_a_gpu, monkeypatch) -> None:
    on_a_gpu((9, 0))
    install(flash=heads_next_to_width)
    monkeypatch.setattr(
        torch.ops.aten, "_scaled_dot_product_cudnn_attention", Mock(side_effect=RuntimeError("old"))
    )
    assert choose_attention("auto", unet, CUDA, torch.bfloat16)[0] == "flash"
    with refused(RecipeError, "unsupported", "speed.attention"):
        choose("cudnn", unet)
    install(flash=heads_next_to_width, xformers=heads_next_to_width)
    assert choose("auto", unet, CUDA) == "flash"
    install(flash=refusing, xformers=heads_next_to_width)
    assert choose("auto", unet, CUDA) == "xformers"
    install()
    assert choose("auto", unet, CUDA) == "sdpa"


def test_auto_on_a_cpu_asks_no_package(unet, install) -> None:
    install(flash=heads_next_to_width)
    assert choose("auto", unet) == "sdpa"
