"""fuse and unfuse on diffusers' own networks: same numbers, same keys, undone without a trace."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cdpo.kernels import fuse, unfuse
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

Device = torch.device | str


def sdxl_unet(device: Device = "cpu", **changes: object) -> UNet2DConditionModel:
    """The layers of SDXL's UNet at a thousandth of its width."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "cross_attention_dim": 12,
        "norm_num_groups": 4,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + 10,
    }
    unet = UNet2DConditionModel(**config | changes)
    for parameter in unet.parameters():  # no weight at 1, no bias at 0
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return unet.to(device, memory_format=torch.channels_last)


def vae(device: Device = "cpu") -> AutoencoderKL:
    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        norm_num_groups=2,
    )
    return model.to(device, memory_format=torch.channels_last)


def unet_inputs(dtype: torch.dtype = torch.float32, device: Device = "cpu") -> dict[str, object]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *size: torch.randn(*size, generator=generator).to(device, dtype)  # noqa: E731
    return {
        "sample": draw(2, 4, 8, 8).to(memory_format=torch.channels_last),
        "timestep": torch.tensor([7, 640], device=device),
        "encoder_hidden_states": draw(2, 5, 12),
        "added_cond_kwargs": {"text_embeds": draw(2, 10), "time_ids": 30 * draw(2, 6).abs()},
    }


def run_unet(unet: nn.Module, dtype: torch.dtype = torch.float32, device: Device = "cpu") -> Tensor:
    return unet(**unet_inputs(dtype, device)).sample


def gradients(unet: nn.Module, out: Tensor) -> list[Tensor]:
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    return list(torch.autograd.grad((out * weight).sum(), list(unet.parameters())))


def lost(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    """Largest error of each tensor, as a share of the largest true value."""
    return [
        ((a.double().cpu() - b.cpu()).abs().max() / b.abs().max().cpu().clamp(min=1e-30)).item()
        for a, b in zip(found, truth, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sdxl_unet_agrees_in_output_and_in_every_gradient(backend, device, dtype):
    """Against the network in float64, fusing loses no more than the network itself."""
    unet = sdxl_unet(device).to(dtype)
    exact = copy.deepcopy(unet).double()
    true_out = run_unet(exact, torch.float64, device)
    truth = [true_out, *gradients(exact, true_out)]
    out = run_unet(unet, dtype, device)
    unfused = lost([out, *gradients(unet, out)], truth)
    out = run_unet(fuse(unet), dtype, device)
    fused = lost([out, *gradients(unet, out)], truth)
    # All tensors together obey the rule with room to spare. A single gradient that nearly cancels
    # differs by chance, and otherwise on each processor: among 293 the worst was 2.4 times on one,
    # 4.5 times on another.
    for share in (0.5, 0.9):
        place = int(share * len(unfused))
        assert sorted(fused)[place] < 1.5 * sorted(unfused)[place]
    typical = sorted(unfused)[len(unfused) // 2]
    times = sorted(b / max(a, typical) for a, b in zip(unfused, fused, strict=True))
    assert times[-3] < 4 and times[-1] < 8
    assert fused[0] < 20 * torch.finfo(dtype).eps


def test_vae_agrees(backend, device):
    model = vae(device)
    pixels = torch.randn(2, 3, 16, 16, device=device)
    expected = model.decode(model.encode(pixels).latent_dist.mean).sample
    found = fuse(model).decode(model.encode(pixels).latent_dist.mean).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_every_norm_and_every_geglu_is_fused(operations):
    unet = sdxl_unet()
    norms = sum(type(part) is nn.GroupNorm for part in unet.modules())
    gates = sum(type(part) is GEGLU for part in unet.modules())
    blocks = sum(type(part) is ResnetBlock2D for part in unet.modules())
    with operations:
        run_unet(unet)
    unfused = Counter(operations.names)
    operations.names.clear()
    with operations:
        run_unet(fuse(unet))
    fused = Counter(operations.names)
    assert fused["cdpo::group_norm_silu"] == norms
    assert fused["cdpo::geglu"] == gates > 0
    assert not {"aten::native_group_norm", "aten::gelu"} & set(fused)
    # Two of each block and that of the output have gone; those of the time embedding stay.
    assert unfused["aten::silu"] - fused["aten::silu"] == 2 * blocks + 1


@pytest.mark.parametrize("network", [sdxl_unet, vae], ids=lambda f: f.__name__)
def test_unfuse_leaves_no_trace(network: Callable[[], nn.Module]):
    model = network()
    classes = [type(part) for part in model.modules()]
    parameters = {name: id(p) for name, p in model.named_parameters()}
    before = {name: dict(part.__dict__) for name, part in model.named_modules()}
    assert fuse(model) is model
    assert [type(part) for part in model.modules()] != classes
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert list(model.state_dict()) == list(network().state_dict())
    assert all(isinstance(part, was) for part, was in zip(model.modules(), classes, strict=True))
    assert unfuse(model) is model
    assert [type(part) for part in model.modules()] == classes
    assert {name: dict(part.__dict__) for name, part in model.named_modules()} == before


def test_fusing_twice_is_fusing_once():
    unet = fuse(sdxl_unet())
    classes = [type(part) for part in unet.modules()]
    assert [type(part) for part in fuse(unet).modules()] == classes


def test_weights_pass_between_fused_and_unfused():
    fused, plain = fuse(sdxl_unet()), sdxl_unet()
    for parameter in fused.parameters():
        parameter.data.mul_(1.1)
    plain.load_state_dict(fused.state_dict())
    torch.testing.assert_close(run_unet(plain), run_unet(fused), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ["fuse, adapt", "adapt, fuse"])
def test_adapters_on_everything(order):
    """Adapters on projections, convolutions and the time embedding, before fusing or after."""
    targets = ["to_q", "proj", "conv1", "conv2", "conv_shortcut", "time_emb_proj", "ff.net.2"]

    def adapt(unet: nn.Module) -> nn.Module:
        torch.manual_seed(3)
        config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        return inject_adapter_in_model(config, unet)

    expected = run_unet(adapt(sdxl_unet()))
    unet = adapt(fuse(sdxl_unet())) if order == "fuse, adapt" else fuse(adapt(sdxl_unet()))
    torch.testing.assert_close(run_unet(unet), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(run_unet(sdxl_unet()), expected, atol=1e-3)


def test_a_copy_that_shares_parameters():
    """The reference is made like this; see twin_of."""
    unet = fuse(sdxl_unet())
    twin = copy.deepcopy(unet, {id(p): p for p in unet.parameters()})
    assert torch.equal(run_unet(twin), run_unet(unet))


def test_blocks_of_another_build_keep_their_activation():
    """With scale and shift the embedding comes between norm and SiLU: only the norm is fused."""
    torch.manual_seed(0)
    options = {"in_channels": 8, "temb_channels": 6, "groups": 2}
    for more in ({"time_embedding_norm": "scale_shift"}, {"down": True}, {"non_linearity": "gelu"}):
        block = ResnetBlock2D(**options, **more)
        x, temb = torch.randn(2, 8, 6, 6), torch.randn(2, 6)
        expected = block(x, temb)
        assert type(fuse(block)) is ResnetBlock2D
        torch.testing.assert_close(block(x, temb), expected, rtol=1e-4, atol=1e-5)


def test_output_scale_and_time_embedding_without_activation():
    block = ResnetBlock2D(
        in_channels=8, temb_channels=6, groups=2, output_scale_factor=1.5, skip_time_act=True
    )
    x, temb = torch.randn(2, 8, 6, 6), torch.randn(2, 6)
    expected = block(x, temb)
    torch.testing.assert_close(fuse(block)(x, temb), expected, rtol=1e-4, atol=1e-5)


def test_shortcuts_stay_channels_last_in_training():
    block = fuse(ResnetBlock2D(in_channels=8, out_channels=4, temb_channels=6, groups=2)).train()
    block = block.to(memory_format=torch.channels_last)
    seen = []
    block.conv_shortcut.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    out = block(x, torch.randn(2, 6))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert out.is_contiguous(memory_format=torch.channels_last)


ONE_LEVEL = {  # has each kind of layer that is fused, and is compiled in a third of the time
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("CrossAttnUpBlock2D",),
    "transformer_layers_per_block": 1,
    "attention_head_dim": 2,
}


def check_compiled(device: Device, compiler: str) -> None:
    unet = fuse(sdxl_unet(device, **ONE_LEVEL))
    expected = run_unet(unet, device=device)
    truth = gradients(unet, expected)
    torch._dynamo.reset()
    compiled = torch.compile(unet, fullgraph=True, backend=compiler)
    found = run_unet(compiled, device=device)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(gradients(unet, found), truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


def test_a_fused_unet_compiles_without_graph_breaks(backend, device):
    check_compiled(device, "aot_eager")


@pytest.mark.slow
@pytest.mark.long
def test_a_fused_unet_compiles_with_inductor():
    check_compiled("cuda" if torch.cuda.is_available() else "cpu", "inductor")


def test_dropout_of_a_block_stays():
    block = ResnetBlock2D(in_channels=8, temb_channels=6, groups=2, dropout=0.5).eval()
    x, temb = torch.randn(2, 8, 6, 6), torch.randn(2, 6)
    expected = block(x, temb)
    torch.testing.assert_close(fuse(block)(x, temb), expected, rtol=1e-4, atol=1e-5)
    block.train()
    assert not torch.allclose(block(x, temb), block(x, temb), atol=1e-2)


@pytest.mark.parametrize("undo", [False, True])
def test_layers_with_a_forward_of_their_own_are_refused(undo):
    """As accelerate's hooks give them: another class would not reach it."""
    unet = fuse(sdxl_unet()) if undo else sdxl_unet()
    classes = [type(part) for part in unet.modules()]
    norm = unet.conv_norm_out
    norm.forward = norm.forward
    with pytest.raises(ValueError, match=r"conv_norm_out \(1 layers in all\) has a forward of its"):
        (unfuse if undo else fuse)(unet)
    assert [type(part) for part in unet.modules()] == classes


def test_a_norm_with_weight_and_no_bias_is_left_alone():
    norm = nn.GroupNorm(2, 4)
    norm.bias = None
    both = nn.ModuleList([norm, nn.GroupNorm(2, 4)])
    assert [type(part) is nn.GroupNorm for part in fuse(both)] == [True, False]


def test_nothing_to_fuse():
    """Transformers have other layers: they stay as they are."""
    layer = nn.Linear(2, 2)
    assert fuse(layer) is layer and type(layer) is nn.Linear
