"""Knobs of memory and speed: the step-0 loss under each, and that they do what they say."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import tiny
import torch
from cdpo.engine.basics.errors import RecipeError
from cdpo.engine.models import Backbone, tuning
from cdpo.engine.models.adapters import add_lora, twin_of
from cdpo.engine.models.tuning import (
    choose_tuning,
    offload,
    order_weights,
    tune_denoiser,
    tune_for_sampling,
    tune_for_training,
    uncompiled,
)
from cdpo.engine.recipe import Adapter, Recipe, Speed
from cdpo.kernels import PairedLoss, paired_dpo_loss
from diffusers import UNet2DConditionModel
from refusals import refused
from torch import Tensor, nn

LOG_2 = math.log(2)
CPU = torch.device("cpu")
PAIRS = 2
# One graph a block, as inductor would get it, run by eager kernels: seconds in place of minutes.
CAPTURE_ONLY = {"backend": "aot_eager", "dynamic": False}
# One block down, one up: what takes minutes to compile for the tiny world's UNet takes seconds.
SMALL = {
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("CrossAttnUpBlock2D",),
}
EAGER_KNOBS = [
    Speed(channels_last=images, fused_kernels=fused, activation_checkpointing=checkpointing)
    for images, fused, checkpointing in itertools.product(
        ("off", "on"), ("off", "on"), (False, True)
    )
]


class Networks:
    """Policy and reference of a tiny UNet, tuned, and a DPO step between them."""

    def __init__(self, recipe: Recipe, backbone: Backbone, *, full: bool = False) -> None:
        network = backbone.denoiser
        if full:
            self.policy = network.requires_grad_(True)
            self.reference = copy.deepcopy(network).requires_grad_(False)
        else:
            self.reference = twin_of(network)
            self.policy = add_lora(network, Adapter(rank=2, alpha=2.0), seed=0)
        self.policy.train()
        self.reference.eval()
        tuning = tune_for_training(recipe, backbone, self.policy, [self.reference])
        order_weights(tuning, self.policy, self.reference)
        self.trained = [p for p in self.policy.parameters() if p.requires_grad]
        self.dtype = next(network.parameters()).dtype

    def predict(self, net: nn.Module) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        noisy = torch.randn(2 * PAIRS, 4, 8, 8, generator=generator).to(self.dtype)
        text = torch.randn(2 * PAIRS, 5, 16, generator=generator).to(self.dtype)
        timesteps = torch.tensor([7, 900] * 2)
        return net(noisy, timesteps, encoder_hidden_states=text, return_dict=False)[0]

    def loss(self) -> PairedLoss:
        generator = torch.Generator().manual_seed(2)
        target = torch.randn(PAIRS, 4, 8, 8, generator=generator)
        with torch.no_grad():
            reference = self.predict(self.reference)
        return paired_dpo_loss(self.predict(self.policy), reference, target, 2500.0)

    def gradients(self) -> Tensor:
        self.loss().loss.backward()
        return torch.cat([p.grad.flatten().float() for p in self.trained if p.grad is not None])


@pytest.fixture
def make(tiny_recipe: Callable[..., Recipe], tiny_backbone: Backbone) -> Callable[..., Networks]:
    """Networks of the tiny world's UNet, each of its own copy."""

    def make(
        spec: Speed, dtype: torch.dtype = torch.float32, *, small: bool = False, **options
    ) -> Networks:
        backbone = copy.deepcopy(tiny_backbone)
        if small:
            torch.manual_seed(0)
            backbone.denoiser = tiny.unet(**SMALL).requires_grad_(False)
        nn.Module.to(backbone.denoiser, dtype)
        recipe = tiny_recipe().model_copy(update={"speed": spec})
        return Networks(recipe, backbone, **options)

    return make


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_first_loss_is_exactly_log_2_under_every_eager_knob(make, dtype, full) -> None:
    half = (1, 2, 4, 7) if full else (0, 3, 5, 6)  # each two of the knobs in all four ways
    for spec in (EAGER_KNOBS[number] for number in half):
        step = make(spec, dtype, full=full).loss()
        assert step.logits.tolist() == [0.0] * PAIRS, spec
        assert step.loss.item() == pytest.approx(LOG_2, abs=1e-7), spec


def test_checkpointing_changes_no_gradient(make) -> None:
    kept = make(Speed()).gradients()
    assert kept.abs().max() > 0
    assert torch.equal(make(Speed(activation_checkpointing=True)).gradients(), kept)


def test_checkpointing_is_for_the_policy_alone(make) -> None:
    networks = make(Speed(activation_checkpointing=True))
    assert networks.policy.is_gradient_checkpointing
    assert not networks.reference.is_gradient_checkpointing


@pytest.mark.parametrize(
    "spec", [spec for spec in EAGER_KNOBS if not spec.activation_checkpointing]
)
def test_gradients_are_those_of_the_network_as_it_was(make, spec) -> None:
    plain, tuned = make(Speed()).gradients(), make(spec).gradients()
    assert (tuned - plain).norm() / plain.norm() < 1e-4


# --------------------------------------------------------------------------------------------------
# Compilation


@pytest.fixture
def captured_only(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(tuning, "COMPILE", CAPTURE_ONLY)
    yield
    torch.compiler.reset()


def passes(networks: Networks) -> list[Tensor]:
    """What reference and policy predict, and the policy's gradients of one sum of that."""
    with torch.no_grad():
        reference = networks.predict(networks.reference)
    policy = networks.predict(networks.policy)
    weights = torch.linspace(-1, 1, policy.numel(), dtype=torch.float64).view_as(policy)
    (policy * weights.to(policy.dtype)).sum().backward()
    gradients = [p.grad for p in networks.trained if p.grad is not None]
    return [value.detach().double() for value in (reference, policy, *gradients)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "checkpointing"),
    [
        ("regional", True),
        pytest.param("full", False, marks=pytest.mark.long),
        pytest.param("regional", False, marks=pytest.mark.long),
        pytest.param("full", True, marks=pytest.mark.long),
    ],
)
def test_compiled_networks_keep_names_gradients_and_the_first_loss(
    make, captured_only, mode, checkpointing
) -> None:
    plain = make(Speed(), small=True)
    networks = make(Speed(compile=mode, activation_checkpointing=checkpointing), small=True)
    assert list(networks.policy.state_dict()) == list(plain.policy.state_dict())
    assert networks.loss().loss.item() == pytest.approx(LOG_2, abs=1e-6)
    truth = make(Speed(), torch.float64, small=True)
    for found, other, exact in zip(*map(passes, (networks, plain, truth)), strict=True):
        assert (found - exact).norm() <= 2 * (other - exact).norm() + 1e-7 * exact.norm()


def test_regional_compiles_the_repeated_blocks_and_samples_run_without(make, captured_only) -> None:
    networks = make(Speed(compile="regional"))
    compiled = [m for m in networks.policy.modules() if m._compiled_call_impl is not None]
    assert {type(part).__name__ for part in compiled} == {"BasicTransformerBlock", "ResnetBlock2D"}
    with uncompiled(networks.policy):
        assert all(m._compiled_call_impl is None for m in networks.policy.modules())
    assert all(part._compiled_call_impl is not None for part in compiled)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1500)
def test_inductor_is_as_exact_as_eager_in_each_gradient(make) -> None:
    """Of every parameter by itself: a norm over all of them hides what the smallest lose."""
    plain = make(Speed(), small=True)
    networks = make(Speed(compile="full"), small=True)
    truth = make(Speed(), torch.float64, small=True)
    found, other, exact = (passes(part) for part in (networks, plain, truth))
    torch.compiler.reset()
    assert len(exact) > 10
    for ours, eager, true in zip(found, other, exact, strict=True):
        assert (ours - true).norm() <= 2 * (eager - true).norm() + 1e-6 * true.norm()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1500)
def test_inductor_rounds_policy_and_reference_alike_in_bfloat16(make) -> None:
    """Without `emulate_precision_casts` the tiny world's logits are around 2 here, not 0."""
    spec = Speed(compile="regional", activation_checkpointing=True, fused_kernels="on")
    networks = make(spec, torch.bfloat16, small=True)
    optimizer = torch.optim.AdamW(networks.trained, lr=1e-3)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        step = networks.loss()
        step.loss.backward()
        optimizer.step()
        losses.append(step.loss.item())
    torch.compiler.reset()
    assert losses[0] == pytest.approx(LOG_2, abs=1e-3)
    assert losses[1] != losses[0]


def test_a_compiler_that_does_not_work_is_one_line(tiny_backbone, monkeypatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no C++ compiler found\nand a long trace")

    monkeypatch.setattr(torch, "compile", fail)
    with refused(RecipeError, "unsupported", "speed.compile") as told:
        choose_tuning(Speed(compile="regional"), tiny_backbone.denoiser, CPU, training=True)
    assert "\n" not in str(told.value)


# --------------------------------------------------------------------------------------------------
# What is chosen, and where things are


def test_auto_is_off_on_a_cpu_and_the_line_says_what_is_on(tiny_backbone) -> None:
    denoiser = tiny_backbone.denoiser
    assert str(choose_tuning(Speed(), denoiser, CPU, training=True)) == "attention sdpa"
    everything = Speed(
        channels_last="on", fused_kernels="on", activation_checkpointing=True, encoders="offload"
    )
    assert str(choose_tuning(everything, denoiser, CPU, training=True)) == (
        "channels_last, fused kernels, attention sdpa, activation checkpointing, encoders offloaded"
    )
    cuda = choose_tuning(Speed(attention="sdpa"), denoiser, torch.device("cuda"), training=True)
    assert cuda.channels_last and cuda.fused_kernels


def test_sampling_leaves_out_what_is_for_training(tiny_backbone) -> None:
    spec = Speed(compile="full", activation_checkpointing=True, rounding="free")
    tuning = choose_tuning(spec, tiny_backbone.denoiser, CPU)
    assert (tuning.compile, tuning.activation_checkpointing) == ("off", False)
    assert not tuning.free_rounding


def test_rounding_that_is_free_is_free_within_alone_and_both_names_of_tf32_can_be_read(
    tiny_backbone,
) -> None:
    """PyTorch raises where one of the names was set so that the other cannot say it."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul

    def state() -> list[object]:
        tf32 = matmul.fp32_precision == "tf32"
        precision = torch.get_float32_matmul_precision()
        return [cudnn.benchmark, matmul.allow_tf32, tf32, precision, cudnn.allow_tf32]

    def of(spec: Speed) -> tuning.Tuning:
        return choose_tuning(spec, tiny_backbone.denoiser, CPU, training=True)

    free, fixed = of(Speed(rounding="free")), of(Speed())
    before = state()
    with pytest.raises(KeyError), tuning.rounding(free):
        assert state() == [True, True, True, "high", before[-1]]
        raise KeyError
    assert state() == before
    with tuning.rounding(fixed):
        assert state() == before


def test_sampling_draws_the_same_pictures_up_to_rounding(tiny_backbone) -> None:
    noise = torch.randn(2, *tiny_backbone.latent_shape((16, 16)))

    def draw() -> Tensor:
        images = tiny_backbone.sample(
            tiny_backbone.denoiser, ["red apple", "house"], noise, steps=2, guidance=2.0
        )
        pixels = [torch.tensor(list(image.tobytes())) for image in images]
        return torch.stack(pixels).float()

    before = draw()
    spec = Speed(channels_last="on", fused_kernels="on", encoders="offload")
    tune_for_sampling(spec, tiny_backbone)
    assert (draw() - before).abs().max() <= 1  # of 255
    weight = tiny_backbone.denoiser.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_weights_that_train_keep_their_order_and_so_do_frozen_copies_of_them(make) -> None:
    spec = Speed(channels_last="on")
    adapters, full = make(spec), make(spec, full=True)
    assert not adapters.reference.conv_in.weight.is_contiguous()
    assert adapters.policy.conv_in.weight is adapters.reference.conv_in.weight
    assert full.policy.conv_in.weight.is_contiguous()
    assert full.reference.conv_in.weight.is_contiguous()


def test_tuning_again_changes_nothing(tiny_backbone) -> None:
    spec = Speed(channels_last="on", fused_kernels="on")
    denoiser: UNet2DConditionModel = tiny_backbone.denoiser
    tune_denoiser(spec, tiny_backbone)
    hooks = [len(part._forward_pre_hooks) for part in denoiser.modules()]
    classes = [type(part) for part in denoiser.modules()]
    tune_denoiser(spec, tiny_backbone)
    assert hooks == [len(part._forward_pre_hooks) for part in denoiser.modules()]
    assert classes == [type(part) for part in denoiser.modules()]


class Traveller(nn.Module):
    """A network that notes where it is told to be, and where its argument is."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []

    def to(self, device: torch.device | str) -> Traveller:
        self.log.append(str(device))
        return self

    def forward(self, x: Tensor, *, fail: bool = False) -> Tensor:
        self.log.append(f"computes on {x.device}")
        if fail:
            raise RuntimeError("as told")
        return x


def test_an_offloaded_network_is_on_the_device_for_its_calls_alone() -> None:
    network = Traveller()
    offload(network, ["forward"], torch.device("meta"))
    assert network.log == ["cpu"]
    visit = ["meta", "computes on meta", "cpu"]
    network(torch.ones(1))
    assert network.log == ["cpu", *visit]
    with pytest.raises(RuntimeError, match="as told"):
        network(torch.ones(1), fail=True)
    assert network.log == ["cpu", *visit, *visit]
