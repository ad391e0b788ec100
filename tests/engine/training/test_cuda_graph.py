"""Micro-batches that are captured: what a replay gives is what computing gives, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import bare, of_latents, train_a_little
from cdpo.engine.models import load_backbone
from cdpo.engine.objectives import Loss, TrainingBatch, build_objective
from cdpo.engine.recipe import Recipe
from cdpo.engine.training import cuda_graph
from cdpo.engine.training.batch import BatchMaker
from cdpo.engine.training.cuda_graph import CapturedLoss, CudaRecorder, Recorder, hindrance
from cdpo.engine.training.networks import build_networks
from launching import CALM, ROOT, World, losses, metrics
from taped import Tape
from torch import Tensor, nn

CPU = torch.device("cpu")
TAPED = ROOT / "tests" / "workers" / "train_taped.py"
long = pytest.mark.long


class Told:
    """A terminal that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.line = self.warn = self.lines.append


def step(loss_of: Callable[[TrainingBatch], Loss], batch: TrainingBatch, weights: Any) -> Any:
    """A loss, all that explains it, and the gradients under accumulation and fp16's scale."""
    loss = loss_of(batch)
    (loss.loss / 3 * 1024).backward()
    gradients = [weight.grad for weight in weights]
    for weight in weights:
        weight.grad = None
    return [*(None if x is None else x.detach() for x in vars(loss).values()), *gradients]


@pytest.mark.parametrize(
    ("family", "knobs"),
    [
        ("sd", ()),
        ("sdxl", ()),
        ("lcm", ("objective.target=mixed",)),
        pytest.param("lcm", (), marks=long),
        pytest.param("lcm", ("objective.target=image",), marks=long),
        pytest.param("lcm", ("objective.type=consistency_sft", "objective.beta=1"), marks=long),
        pytest.param(
            "sd", ("objective.type=sft", "objective.timestep_weighting=min_snr"), marks=long
        ),
        pytest.param("sd", ("objective.loss=ipo", "adapter.dora=true"), marks=long),
        pytest.param("sd", ("objective.loser_safeguard=0.5", "speed.channels_last=on"), marks=long),
        pytest.param("sd", ("adapter.targets=lcm", "speed.fused_kernels=on"), marks=long),
        pytest.param("sd", ("objective.reference_ema=0.9",), marks=long),
    ],
)
def test_a_replay_is_the_step_to_the_bit(
    recipe_of: Callable[..., Recipe], family: str, knobs: tuple[str, ...]
) -> None:
    holds(recipe_of(family, *knobs), CPU, Tape)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["sd", "sdxl", "lcm"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_graph_of_cuda_is_the_step_to_the_bit(
    recipe_of: Callable[..., Recipe], family: str, precision: str
) -> None:
    recipe = recipe_of(family, f"train.precision={precision}")
    holds(recipe, torch.device("cuda"), CudaRecorder)


def holds(recipe: Recipe, device: torch.device, recorder: Callable[[], Recorder]) -> None:
    """Three batches, replayed and computed, with other weights each."""
    told = Told()
    backbone = load_backbone(recipe.model, device, recipe.train.precision)
    networks = build_networks(recipe, backbone, build_objective(recipe.objective))
    networks.policy.to(backbone.denoiser.dtype)  # adapters too, as DeepSpeed has it
    maker = BatchMaker(recipe, backbone, (16, 16), device)
    weights = [weight for weight in networks.policy.parameters() if weight.requires_grad]
    captured = CapturedLoss(networks, networks.loss, told, recorder)
    for visit, ids in enumerate([(0, 1), (2, 3), (5, 2)]):  # other prompts and timesteps each
        train_a_little(networks.policy, seed=visit)
        batch = maker.make(of_latents(*ids, visit=visit))
        both = step(captured, batch, weights), step(networks.loss, batch, weights)
        assert any(gradient.abs().max() > 0 for gradient in both[1][5:] if gradient is not None)
        for ours, theirs in zip(*both, strict=True):
            assert (ours is theirs) or torch.equal(ours.nan_to_num(7), theirs.nan_to_num(7))
    assert captured.captures == 1
    assert told.lines == ["cuda graph: a micro-batch is captured"]


# --------------------------------------------------------------------------------------------------
# On a network of one layer


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("shift", torch.ones(4))

    def loss(self, batch: TrainingBatch) -> Loss:
        error = (batch.target * self.weight - self.shift).square().mean(1)
        return Loss(error.mean(), error.detach(), error.detach(), error.detach())


def target(pairs: int = 2) -> TrainingBatch:
    return bare(torch.arange(4.0 * pairs).view(pairs, 4))


@pytest.mark.parametrize(
    ("breach", "said"),
    [
        (lambda net, x: x * x.sum().item(), "_local_scalar_dense waits"),
        (lambda net, x: x if x.sum() > 0 else -x, "_local_scalar_dense waits"),
        (lambda net, x: x[x > 0].sum() + x, "index.Tensor waits"),
        (lambda net, x: x + torch.tensor([1.0, 2, 3, 4]), "the host has made"),
        (lambda net, x: x.index_select(0, torch.as_tensor([1, 0])), "the host has made"),
        (lambda net, x: x + torch.arange(4), None),
    ],
    ids=["value", "branch", "mask", "constant", "rows", "none"],
)
def test_a_breach_of_the_rules_of_capture_is_found(breach: Any, said: str | None) -> None:
    net = Line()

    def loss_of(batch: TrainingBatch) -> Loss:
        error = breach(net, batch.target * net.weight).square().mean(1)
        return Loss(error.mean(), error.detach(), error.detach(), error.detach())

    captured = CapturedLoss(net, loss_of, Told(), Tape)
    if said is None:
        captured(target())
        return
    with pytest.raises(AssertionError, match=said):
        captured(target())
    assert captured._trained[0] is net.weight  # and no alias of it


def test_hooks_of_the_weights_run_for_each_replay_and_for_no_capture() -> None:
    net, seen = Line(), []
    net.weight.register_hook(lambda gradient: gradient * len(seen))
    net.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.clone()))
    captured = CapturedLoss(net, net.loss, Told(), Tape)
    for _ in range(3):
        captured(target()).loss.backward()
    assert net.unused.grad is None
    # The gradients of one batch times 0, 1, 2, added up.
    assert len(seen) == 3 and seen[1].abs().max() > 0
    assert torch.equal(seen[2], 3 * seen[1])


def test_other_sizes_and_places_are_captured_again_and_not_for_ever() -> None:
    net, told = Line(), Told()
    captured = CapturedLoss(net, net.loss, told, Tape)

    def is_right(pairs: int = 2) -> None:
        assert torch.equal(captured(target(pairs)).loss, net.loss(target(pairs)).loss)

    for pairs in (2, 2, 1):
        is_right(pairs)
    net.weight.data = net.weight.data.clone() * 2
    is_right(1)
    net.shift.data = net.shift.data.clone() * 3
    is_right(1)
    assert captured.captures == cuda_graph.MOST_CAPTURES
    is_right(1)
    is_right(2)
    is_right(1)
    assert captured.captures == 0
    made = "cuda graph: a micro-batch is captured"
    sizes, places = "again, for other sizes of a batch", "again, for other places of weights"
    assert told.lines == [
        made,
        f"{made} {sizes}",
        f"{made} {places}",
        f"{made} {places}",
        f"cuda graph: after 4 captures it would be captured {sizes}; "
        "micro-batches are computed without from here on",
    ]


def test_what_cannot_be_captured_is_told_once_and_computed() -> None:
    class Failing(Tape):
        def record(self, work: Callable[[], Any]) -> Any:
            raise RuntimeError("CUDA error: operation not permitted\nand a long trace")

    net, told = Line(), Told()
    captured = CapturedLoss(net, net.loss, told, Failing)
    for _ in range(2):
        captured(target()).loss.backward()
    gradient: Tensor | None = net.weight.grad
    assert gradient is not None and gradient.abs().max() > 0
    assert captured.captures == 0 and isinstance(net.weight, nn.Parameter)
    [line] = told.lines
    assert "cannot be captured (CUDA error: operation not permitted" in line and "\n" not in line


@pytest.mark.parametrize(
    ("knob", "zero", "why"),
    [
        ("seed=1", {"stage": 2, "offload_optimizer": {"device": "none"}}, None),
        ("seed=1", {"stage": 3}, "ZeRO-3"),
        ("seed=1", {"stage": 1, "offload_optimizer": {"device": "cpu"}}, "offload_optimizer"),
        ("adapter.dropout=0.1", {"stage": 2}, "adapter.dropout"),
        ("speed.compile=full", {"stage": 2}, "speed.compile=full"),
        ("speed.frozen_cache=2", {"stage": 2}, "speed.frozen_cache"),
        ("speed.activation_checkpointing=true", {"stage": 2}, "speed.activation_checkpointing"),
    ],
)
def test_what_hinders_is_named(tiny_recipe: Any, knob: str, zero: Any, why: str | None) -> None:
    recipe = tiny_recipe(knob)
    found = hindrance(recipe, torch.device("cuda"), zero)
    assert found is why if why is None else why in (found or "")
    assert hindrance(recipe, CPU, zero) == "there is no CUDA device"


# --------------------------------------------------------------------------------------------------
# Through the real trainer


@pytest.mark.slow
def test_a_run_with_captured_micro_batches_is_the_run_without(
    world: World, plain: list[float], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    outcome = world.train(run, *CALM, "speed.cuda_graph=auto", script=TAPED).succeeded()
    assert losses(run) == plain
    assert {row["captures"] for row in metrics(run)} == {1}
    assert outcome.text.count("a micro-batch is captured") == 1


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    ("zero", "ranks", "knobs"),
    [
        (1, 2, ("train.precision=bf16",)),
        (2, 1, ("train.precision=fp16", "train.steps=20", "curriculum.steps_per_tier=7")),
        (2, 2, ("adapter.rank=4", "adapter.rank_schedule=[1,2,4]", "adapter.opening=inside_out")),
        (1, 1, ("objective.target_logit=1.4", "objective.reference_ema=0.9", "adapter.ema=0.9")),
        (2, 1, ("train.sample_every=2", "evaluate.every=2", "evaluate.images=1")),
    ],
    ids=["bf16", "fp16", "growth", "moving", "drawing"],
)
def test_runs_of_every_kind_are_those_without(
    world: World, tmp_path: Path, zero: int, ranks: int, knobs: tuple[str, ...]
) -> None:
    if "evaluate.every=2" in knobs:
        prompts = tmp_path / "validation.txt"
        prompts.write_text("a rocket\na green book\n")
        knobs += ("evaluate.prompts=1", f"prompts.validation={prompts}")
    rows = []
    for name, script in (("plain", "train"), ("taped", TAPED)):
        run = tmp_path / name
        mine = (*knobs, *(("speed.cuda_graph=auto",) if name == "taped" else ()))
        world.train(run, *mine, zero=zero, ranks=ranks, script=script).succeeded()
        rows.append([{**row, "pairs_per_second": 0} for row in metrics(run)])
    assert rows[1] == [{**row, "captures": 1} for row in rows[0]]
