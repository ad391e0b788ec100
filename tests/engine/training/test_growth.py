"""Ranks that grow and blocks that open: against adapters, and moments, that are really padded."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cdpo.engine.basics.errors import RecipeError
from cdpo.engine.curriculum.pacing import Pacing
from cdpo.engine.models.adapters import add_lora
from cdpo.engine.recipe import Adapter, Curriculum
from cdpo.engine.recipe.identity import diff_identity, training_identity
from cdpo.engine.training.growth import Growth, block_depths, growth_rows
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import CALM, KILLED, ROOT, World, losses, metrics
from operations import Operations
from peft import LoraConfig, inject_adapter_in_model
from refusals import refused
from safetensors.torch import load_file
from stock import assert_draws_what_the_trainer_drew, distance
from torch import Tensor, nn

CPU = torch.device("cpu")
WATCHED = ROOT / "tests" / "workers" / "train_and_watch_growth.py"
SHRINKING = ("adapter.rank=4", "adapter.rank_schedule=[4,2,4]")
GROWING = ("adapter.rank=4", "adapter.rank_schedule=[1,2,4]", "adapter.opening=inside_out")


def pacing(num_stages: int, steps_per_tier: int = 3) -> Pacing:
    curriculum = Curriculum(tiers=num_stages, steps_per_tier=steps_per_tier)
    return Pacing(curriculum, num_stages * steps_per_tier)


# --------------------------------------------------------------------------------------------------
# The arithmetic: against a loop that pads, in float64


class Nested(nn.Module):
    """Two pairs of blocks around a middle, as a UNet names them, one of them a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Linear(5, 6)
        self.down_blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.mid_block = nn.Linear(6, 6)
        self.up_blocks = nn.ModuleList([nn.Linear(6, 6), nn.Conv2d(6, 3, 1)])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv_in(x))
        for block in (*self.down_blocks, self.mid_block, self.up_blocks[0]):
            x = torch.tanh(block(x))
        return self.up_blocks[1](x[:, :, None, None])[:, :, 0, 0]


LAYERS = ("mid_block", "down_blocks.1", "up_blocks.0", "down_blocks.0", "up_blocks.1", "conv_in")
OPENED_AT = dict(zip(LAYERS, (0, 0, 0, 1, 1, 1), strict=True))
BETAS, LR, EPS, ALPHA = (0.9, 0.99), 3e-3, 1e-8, 6.0


class Padded:
    """One layer's A (r, in) and B (out, r) with AdamW of its own, all of which can grow."""

    def __init__(self, base: nn.Module, rows: Tensor, scale: float) -> None:
        self.base, self.later_rows, self.scale = base, rows.flatten(1), scale
        self.weight = base.weight.detach().flatten(1)
        self.a = torch.zeros(0, self.weight.shape[1], dtype=torch.float64)
        self.b = torch.zeros(len(self.weight), 0, dtype=torch.float64)
        self.moments = [[torch.zeros_like(part) for _ in range(2)] for part in (self.a, self.b)]

    def grow(self, rank: int) -> None:
        new = rank - len(self.a)
        a, b = self.a.detach(), self.b.detach()
        self.a = torch.cat([a, self.later_rows[len(a) : rank]]).requires_grad_()
        self.b = torch.cat([b, b.new_zeros(len(b), new)], dim=1).requires_grad_()
        of_a, of_b = self.moments
        of_a[:] = [torch.cat([m, m.new_zeros(new, m.shape[1])]) for m in of_a]
        of_b[:] = [torch.cat([m, m.new_zeros(len(m), new)], dim=1) for m in of_b]

    def __call__(self, x: Tensor) -> Tensor:
        return x @ (self.weight + self.scale * self.b @ self.a).T + self.base.bias

    @torch.no_grad()
    def step(self, number: int) -> None:
        """AdamW as its paper has it, without decay; ``number`` from 1."""
        for part, (first, second) in zip((self.a, self.b), self.moments, strict=True):
            assert part.grad is not None
            first += (1 - BETAS[0]) * (part.grad - first)
            second += (1 - BETAS[1]) * (part.grad**2 - second)
            mean = first / (1 - BETAS[0] ** number)
            spread = second / (1 - BETAS[1] ** number)
            part -= LR * mean / (spread.sqrt() + EPS)
            part.grad = None


def padding_run(base: Nested, rows: dict[str, Tensor], plan: Pacing, ranks: tuple[int, ...]) -> Any:
    """Losses, and the layers as they end; each layer is as large as its stage says."""
    layers = {n: Padded(base.get_submodule(n), rows[n], ALPHA / ranks[-1]) for n in LAYERS}
    found = []
    for step in range(plan.total_steps):
        stage = plan.stage_at(step)
        for name, layer in layers.items():
            if stage.index >= OPENED_AT[name] and len(layer.a) < ranks[stage.index]:
                layer.grow(ranks[stage.index])
        x, wanted = batch(step)
        for name in ("conv_in", "down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0"):
            x = torch.tanh(layers[name](x))
        loss = (layers["up_blocks.1"](x) - wanted).square().mean()
        loss.backward()
        found.append(loss.item())
        for layer in layers.values():
            if layer.a.requires_grad:
                layer.step(step + 1)
    return found, layers


def masking_run(base: Nested, spec: Adapter, plan: Pacing) -> Any:
    """Losses, and the network as it ends; with what `Growth` does and torch's AdamW."""
    network = copy.deepcopy(base).requires_grad_(False)
    config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=list(LAYERS))
    inject_adapter_in_model(config, network)
    network.double()
    growth = Growth(network, spec, plan, CPU)
    start = {name: p.detach().clone() for name, p in network.named_parameters()}
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=BETAS, eps=EPS, weight_decay=0)
    found = []
    for step in range(plan.total_steps):
        x, wanted = batch(step)
        before = network(x)
        growth.enter(plan.stage_at(step))
        assert torch.equal(network(x), before)
        loss = (network(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found, network, start, optimizer


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    return x, torch.sin(2 * x[:, :3]) + x[:, 3:4]


@settings(max_examples=8, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 6), min_size=3, max_size=3).map(sorted).map(tuple),
    steps_per_tier=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_masked_training_is_that_of_adapters_that_are_padded(
    ranks: tuple[int, ...], steps_per_tier: int, seed: int
) -> None:
    """Losses, A, B and both moments; and what never opened is as it was, to the bit."""
    torch.manual_seed(seed)
    base, plan = Nested().double(), pacing(3, steps_per_tier)
    spec = Adapter(rank=ranks[-1], alpha=ALPHA, rank_schedule=ranks, opening="inside_out")
    ours, network, start, optimizer = masking_run(base, spec, plan)
    rows = {name: start[f"{name}.lora_A.default.weight"] for name in LAYERS}
    theirs, layers = padding_run(base, rows, plan, ranks)
    assert ours == pytest.approx(theirs, rel=1e-9)
    assert ours[-1] != ours[0]
    for name, layer in layers.items():
        for kind, value, moments in zip("AB", (layer.a, layer.b), layer.moments, strict=True):
            weight = network.get_parameter(f"{name}.lora_{kind}.default.weight")
            torch.testing.assert_close(weight.flatten(1), value, rtol=1e-7, atol=1e-9)
            for key, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
                state = optimizer.state[weight][key].flatten(1)
                torch.testing.assert_close(state, moment, rtol=1e-7, atol=1e-10)


# --------------------------------------------------------------------------------------------------
# On UNets: what opens when, and what the network is meanwhile


@pytest.mark.parametrize(
    ("stage", "inner", "outer"), [(0, 1, 1), (1, 1, 1), (2, 0, 0)], ids=["half", "less", "all"]
)
def test_what_is_open_costs_nothing_and_what_is_closed_one_product(
    stage: int, inner: int, outer: int, operations: Operations
) -> None:
    network = Nested().requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["mid_block", "conv_in"]), network)
    spec = Adapter(rank=4, rank_schedule=(1, 2, 4), opening="inside_out")
    plan = pacing(3)
    growth = Growth(network, spec, plan, CPU)
    growth.enter(plan.stages[stage])
    with operations:
        growth.enter(plan.stages[stage])
        assert not operations.names
        for part, products in ((network.mid_block, inner), (network.conv_in, outer)):
            operations.names.clear()
            torch.autograd.grad(part.lora_B["default"].weight.sum(), part.lora_B["default"].weight)
            assert operations.names.count("aten::mul.Tensor") == products


def unet_of(*channels: int, **changes: Any) -> UNet2DConditionModel:
    kinds = {
        "down_block_types": ("CrossAttnDownBlock2D",) * (len(channels) - 1) + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (len(channels) - 1),
    }
    return tiny.unet(block_out_channels=channels, **kinds | changes)


def trained_at_each_stage(network: UNet2DConditionModel, num_stages: int) -> list[set[str]]:
    """The blocks, or whatever else, with a B that has a gradient, by stage."""
    targets = ("to_q", "conv1", "conv_in", "conv_out", "linear_1")
    spec = Adapter(rank=2, targets=targets, opening="inside_out")
    policy = add_lora(network, spec, seed=0)
    torch.manual_seed(0)
    plan = pacing(num_stages)
    growth = Growth(policy, spec, plan, CPU)
    found = []
    for stage in plan.stages:
        growth.enter(stage)
        policy.zero_grad()
        text = torch.randn(1, 9, 16)
        policy(torch.randn(1, 4, 8, 8), torch.tensor([5]), text).sample.square().sum().backward()
        found.append(
            {
                re.sub(r"^((down|up)_blocks\.\d|\w+).*", r"\1", name)
                for name, p in policy.named_parameters()
                if "lora_B" in name and p.grad is not None and p.grad.any()
            }
        )
        assert not any(
            p.grad.any()
            for n, p in policy.named_parameters()
            if "lora_A" in n and p.grad is not None
        )
    return found


def test_a_pair_of_blocks_opens_a_stage_from_the_inside_out() -> None:
    pairs = [
        {"mid_block", "down_blocks.3", "up_blocks.0"},
        {"down_blocks.2", "up_blocks.1"},
        {"down_blocks.1", "up_blocks.2"},
        {"down_blocks.0", "up_blocks.3", "conv_in", "conv_out", "time_embedding"},
    ]
    found = trained_at_each_stage(unet_of(8, 8, 8, 8), 5)
    assert found == [set().union(*pairs[: count + 1]) for count in (0, 1, 2, 3, 3)]


def test_the_last_stage_opens_the_rest() -> None:
    inner, everything = trained_at_each_stage(unet_of(8, 8, 16), 2)
    assert inner == {"mid_block", "down_blocks.2", "up_blocks.0"}
    assert everything == inner | {
        *("down_blocks.0", "down_blocks.1", "up_blocks.1", "up_blocks.2"),
        *("conv_in", "conv_out", "time_embedding"),
    }


def test_depths_with_unequally_many_blocks_and_without_a_middle() -> None:
    network = nn.Module()
    network.down_blocks = nn.ModuleList([nn.Identity()])
    network.up_blocks = nn.ModuleList([nn.Identity() for _ in range(3)])
    expected = {"down_blocks.0": 0, "up_blocks.0": 0, "up_blocks.1": 1, "up_blocks.2": 2}
    assert block_depths(network) == expected


def test_a_network_without_blocks_cannot_open() -> None:
    with refused(RecipeError, "unsupported", "adapter.opening"):
        Growth(nn.Linear(2, 2), Adapter(opening="inside_out"), pacing(2), CPU)


@pytest.mark.parametrize(
    "variant", [{}, {"rslora": True}, {"dora": True}], ids=["lora", "rs", "do"]
)
def test_a_smaller_rank_is_what_adapters_of_that_rank_compute(
    tiny_backbone: Any, variant: dict[str, bool]
) -> None:
    """After some steps at rank 2 of 6, the same columns make adapters of rank 2 of equal output,
    scaled alike; and DoRA's lengths train where the layer is open, and nowhere else.
    """
    base = tiny_backbone.denoiser
    small = copy.deepcopy(base)
    spec = Adapter(
        rank=6, alpha=3.0, targets="lcm", rank_schedule=(2, 6), opening="inside_out", **variant
    )
    policy = add_lora(base, spec, seed=0)
    plan = pacing(2)
    growth = Growth(policy, spec, plan, CPU)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0)
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([5, 700]), torch.randn(2, 9, 16))
    growth.enter(plan.stages[0])
    for _ in range(3):
        optimizer.zero_grad()
        (policy(*inputs).sample - 1).square().mean().backward()
        optimizer.step()
    inner = ("mid_block.", "down_blocks.1.", "up_blocks.0.")
    moved = {name for name, p in trained.items() if not torch.equal(p, start[name])}
    assert moved == {name for name in trained if name.startswith(inner)}

    scaling = 3.0 / math.sqrt(6) if spec.rslora else 3.0 / 6
    alpha = scaling * (math.sqrt(2) if spec.rslora else 2)
    plain = {"rank": 2, "alpha": alpha, "rank_schedule": None, "opening": "all"}
    add_lora(small, spec.model_copy(update=plain), seed=1)
    for name, parameter in trained.items():
        cut = {"lora_A": (0, 0, 2), "lora_B": (1, 0, 2)}
        [where] = [place for kind, place in cut.items() if kind in name] or [(0, 0, len(parameter))]
        small.get_parameter(name).data.copy_(parameter.detach().narrow(*where))
    with torch.no_grad():
        torch.testing.assert_close(small(*inputs).sample, policy(*inputs).sample)


def test_later_rows_of_a_are_gaussian_and_as_large_as_the_first(tiny_backbone: Any) -> None:
    spec = Adapter(rank=256, rank_schedule=(128, 256), targets=("to_q", "conv2"))
    policy = add_lora(tiny_backbone.denoiser, spec, seed=4)
    found = [p.detach() for name, p in policy.named_parameters() if "lora_A" in name]
    assert {p.ndim for p in found} == {2, 4}
    for p in found:
        first, later = p[:128].double(), p[128:].double()
        bound = p[0].numel() ** -0.5
        assert first.abs().max() <= bound < later.abs().max()
        assert later.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        kurtosis = (later / later.std()).pow(4).mean()
        assert kurtosis.item() == pytest.approx(3, abs=0.7)  # of a uniform distribution: 1.8


# --------------------------------------------------------------------------------------------------
# The recipe


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (SHRINKING, "adapter.rank_schedule=[4, 2, 4] shrinks"),
        (("adapter.rank_schedule=[]",), "is empty"),
        (("adapter.rank_schedule=[1,3]",), "ends at 3, and adapter.rank is 2"),
        (("adapter.rank_schedule=[1,1,2,2]",), "has 4 ranks for 3 stages"),
        ((*GROWING, "curriculum.order=random"), "adapter.rank_schedule needs stages"),
        (("adapter.opening=inside_out", "curriculum.tiers=1"), "adapter.opening=inside_out needs"),
        ((*GROWING, "train.optimizer.weight_decay=0.01"), "train.optimizer.weight_decay=0.01"),
        ((*GROWING, "adapter.type=full", "export.formats=[merged]"), "is for adapters"),
    ],
)
def test_what_cannot_grow_is_refused_with_the_fix(
    tiny_recipe: Callable[..., Any], overrides: tuple[str, ...], said: str
) -> None:
    wording = "growth-and-weight-decay" if "weight_decay" in said else None
    with refused(RecipeError, "contradiction", wording=wording) as told:
        tiny_recipe(*overrides)
    assert said in str(told.value)


def test_a_rank_is_at_least_one(tiny_recipe: Callable[..., Any]) -> None:
    with refused(RecipeError, "out-of-range", "adapter.rank_schedule[0]"):
        tiny_recipe("adapter.rank_schedule=[0,2]")


def test_another_schedule_is_another_run(tiny_recipe: Callable[..., Any]) -> None:
    """And a checkpoint from before there were any counts as one of no growth."""
    plain, one = training_identity(tiny_recipe()), training_identity(tiny_recipe(*GROWING))
    other = training_identity(tiny_recipe("adapter.rank=4", "adapter.rank_schedule=[2,4]"))
    assert diff_identity(one, other) == [
        "adapter.rank_schedule: checkpoint [1, 2, 4], recipe [2, 4]",
        "adapter.opening: checkpoint 'inside_out', recipe 'all'",
    ]
    old = {k: v for k, v in plain.items() if k not in ("adapter.rank_schedule", "adapter.opening")}
    assert diff_identity(old, plain) == []
    assert len(diff_identity(old, one)) == 3


def test_the_terminal_says_how_adapters_grow_and_where_a_short_run_ends() -> None:
    spec = Adapter(rank=4, rank_schedule=(1, 2, 4), opening="inside_out")
    [row] = growth_rows(spec, 4)
    text = "rank 1, 2, 4, 4 in stages 1 to 4; blocks open from the inside out"
    assert row == ("growth", text)
    plan = Pacing(Curriculum(tiers=4, steps_per_tier=3), total_steps=4)
    growth = Growth(add_lora(unet_of(8, 8, 8), spec, seed=0), spec, plan, CPU)
    note = "ends at rank 2 of 4, open blocks 5 of 7: train.steps ends before the rest"
    assert growth.describe() == [row, ("note", note)]
    plain = Growth(nn.Linear(1, 1), Adapter(), plan, CPU)
    assert plain.describe() == [] and plain.row == {}


# --------------------------------------------------------------------------------------------------
# Runs of two ranks, with DeepSpeed


@pytest.fixture(scope="module")
def alone(world: World) -> Path:
    """The run of one rank under ZeRO-2."""
    run = world.folder / "grown_alone"
    world.train(run, *GROWING, *CALM).succeeded()
    return run


def test_a_run_grows_and_what_it_exports_is_of_the_full_rank(world: World, tmp_path: Path) -> None:
    # Trained hard enough that six steps show in a picture.
    hard = ("adapter.targets=lcm", "train.optimizer.lr=0.02", "train.sample_every=6")
    world.train(tmp_path, *GROWING, *hard).succeeded()
    rows = metrics(tmp_path)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    grown = [(row["rank"], row["open_blocks"]) for row in rows]
    assert grown == [(1, 3), (1, 3), (2, 5), (2, 5), (4, 5), (4, 5)]
    weights = exported(tmp_path)
    ranks = {len(value) if "lora_A" in name else value.shape[1] for name, value in weights.items()}
    assert ranks == {4} and all(value.any() for value in weights.values())
    assert_draws_what_the_trainer_drew(world.folder / "sd", tmp_path, "lora")


def exported(run: Path) -> dict[str, Tensor]:
    return load_file(run / "lora" / "pytorch_lora_weights.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 3))])
def test_what_is_closed_stays_untouched_under_each_stage(
    world: World, alone: Path, tmp_path: Path, zero: int
) -> None:
    """Weights and moments on both ranks after each step, and the curve is that of one rank."""
    knobs = (*GROWING, *CALM, "adapter.ema=0.9")
    env = {"WATCH_FOLDER": str(tmp_path)}
    run = tmp_path / "run"
    world.train(run, *knobs, ranks=2, zero=zero, script=WATCHED, env=env).succeeded()
    assert losses(run) == pytest.approx(losses(alone), abs=1e-5)
    assert distance(exported(run), exported(alone)) < 1e-5
    first, second = (json.loads((tmp_path / f"growth-{r}.json").read_text()) for r in (0, 1))
    assert first == second and [row["step"] for row in first] == list(range(6))
    for row in first:
        assert row["closed_moved"] == row["closed_moments"] == row["closed_b"] == 0
        # At the very first step B is zero, so that A has no gradient yet.
        assert row["open_moved"] > (0.3 if row["step"] == 0 else 0.5) * row["open"]
    sizes = [row["open"] for row in first]
    assert sizes == sorted(sizes) and len(set(sizes)) == 3
    assert first[-1]["closed"] == 0 < first[0]["closed"]


@pytest.mark.slow
def test_killed_in_one_stage_a_run_goes_on_into_the_next_on_as_many_ranks_or_fewer(
    world: World, alone: Path, tmp_path: Path
) -> None:
    """From step 3, in the second stage, over the switch after step 4: exact, or to rounding."""
    every = (*GROWING, *CALM, "checkpoint.every=3")
    whole, run, elastic = (tmp_path / name for name in ("whole", "run", "elastic"))
    world.train(whole, *every, ranks=2, zero=2).succeeded()
    killed = world.train(run, *every, ranks=2, zero=2, failpoint="train.loss@5:kill/rank1")
    assert KILLED in killed.codes
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000003"]
    shutil.copytree(run, elastic)
    world.train(run, *every, ranks=2, zero=2).succeeded()
    assert losses(run) == losses(whole) and distance(exported(run), exported(whole)) == 0
    text = world.train(elastic, *every, zero=3).succeeded().text
    assert "divided anew for 1 x ZeRO-3" in text
    assert losses(elastic) == pytest.approx(losses(alone), abs=1e-5)
    assert distance(exported(elastic), exported(alone)) < 1e-5
