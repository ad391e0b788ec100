"""DeepSpeed started our way: our optimiser, buckets of the right size, no compiler at first launch.

The optimiser is AdamW, with a moving average of what it trains as one more state where a recipe
wants it. DeepSpeed hands an optimiser the float32 master weights of this rank's partition, and
steps it only when the step is taken. So the average is divided among the ranks under every ZeRO
stage, is saved and restored with Adam's moments, follows them in offloading, and needs no
communication: it costs four bytes a trained parameter and one read and write of them a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.utils import safe_get_full_fp32_param
from torch import Size, Tensor, nn
from torch.nn import functional

from ..basics.errors import OutsideError, RecipeError, told_by
from ..recipe import Optimizer
from .deepspeed_config import TRACKERS
from .optimizer_step import shorten_step

STATE = "ema"
CHUNK = 1 << 24  # elements exchanged at once


def release(engine: deepspeed.DeepSpeedEngine) -> None:
    """Give back the memory of an engine, of its optimiser and its networks, which are of no use
    afterwards: in rounds others follow in the same process.

    Hooks hold an engine that has been forgotten, and under ZeRO-3 parameters keep what they belong
    to after those are gone. So what takes memory is taken out of what stays.
    """
    engine.destroy()
    for parameter in engine.module.parameters():
        for tensor in (parameter, getattr(parameter, "ds_tensor", parameter)):
            tensor.data = tensor.data.new_empty(0)
    for part in (engine.optimizer, engine.module):
        vars(part).clear()


class AveragingAdamW(torch.optim.AdamW):
    """AdamW; ``average = decay * average + (1 - decay) * weight`` after each step.

    The average starts at the weights before the first step.
    """

    def __init__(self, params: Any, *, decay: float, **options: Any) -> None:
        super().__init__(params, **options)
        self._decay = decay

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the weights that have a gradient, then their averages."""
        weights = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        # Not into the state yet: Adam takes a parameter without state for one it has not met.
        starts = {p: p.detach().clone() for p in weights if STATE not in self.state[p]}
        loss = super().step(closure)
        for parameter, start in starts.items():
            self.state[parameter][STATE] = start
        if weights:
            averages = [self.state[p][STATE] for p in weights]
            torch._foreach_lerp_(averages, weights, 1 - self._decay)
        return loss


@contextmanager
def averages_in_place(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within, the weights an optimiser holds are their averages; they come back bit for bit."""
    pairs = [(p.data, state[STATE]) for p, state in optimizer.state.items() if STATE in state]
    _exchange(pairs)
    try:
        yield
    finally:
        _exchange(pairs)


def _exchange(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Swap contents, not tensors: others hold views of these."""
    for one, other in pairs:
        for ours, theirs in zip(one.split(CHUNK), other.split(CHUNK), strict=True):
            kept = ours.clone()
            ours.copy_(theirs)
            theirs.copy_(kept)


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
    if device.type == "cpu":
        _suit_cpus()
    _check_disk(config)
    _fit_bucket(config, sum(p.numel() for p in trainable))
    plain = functional.linear
    try:
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, dist_init_required=False
        )
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in TRACKERS.values():
            raise
        raise OutsideError(
            f"monitor: the tracker does not start: {told_by(error)}; log in to it, or turn it off",
            "monitor",
            "unsupported",
        ) from error
    if functional.linear is not plain:
        functional.linear = partial(linear, plain, functional.linear)
    shorten_step(engine)
    return engine


def linear(
    plain: Callable[..., Tensor],
    of_parts: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """What a linear layer makes of x (…, in) by a weight (out, in): (…, out).

    Under ZeRO-3 DeepSpeed puts a function ``of_parts`` in place of PyTorch's ``plain`` one, in the
    whole process and for good, so that no gathered weight is kept. Here it gets its own weights
    alone: encoders and rewards round as in a process that has not trained. And it gets rows where
    PyTorch makes them: it adds the bias to others on its own, which rounds once more.
    """
    if not hasattr(weight, "ds_id"):
        return plain(x, weight, bias)
    if x.ndim > 2 and x.is_contiguous():
        return of_parts(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])
    return of_parts(x, weight, bias)


def keep_settings(engine: deepspeed.DeepSpeedEngine, spec: Optimizer, gradient_clip: float) -> None:
    """Give an engine that has read a checkpoint the settings of the recipe, not the saved ones."""
    for group in engine.optimizer.param_groups:
        group.update(betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay)
    engine.optimizer.clip_grad = gradient_clip


def _fit_bucket(config: dict[str, Any], trainable: int) -> None:
    """Cap ZeRO's reduction bucket at the gradients there are.

    It is allocated whole, and its default of 5e8 elements is more memory than all the training
    state of most adapters.
    """
    zero = config.setdefault("zero_optimization", {})
    zero["reduce_bucket_size"] = min(int(zero.get("reduce_bucket_size", 5e8)), max(trainable, 1))


def _suit_cpus() -> None:
    """Keep DeepSpeed from compiling its shared-memory helper at first launch, and let fp16 recipes
    run, for tests: slowly, in PyTorch's own kernels.

    The helper takes a C++ compiler and a minute, hangs on the lock of a build that was killed, and
    speeds up only large all-reduces among many ranks of one machine. fp16 DeepSpeed refuses where
    oneDNN has no instructions for it.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
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
                "copy the DeepSpeed JSON and name one on a local disk",
                f"zero_optimization.{section}.nvme_path",
                "missing",
            )
        if not AsyncIOBuilder().is_compatible(verbose=False):
            raise RecipeError(
                f"zero_optimization.{section}.device=nvme needs libaio with its headers, from "
                "which DeepSpeed builds its reader: apt install libaio-dev",
                f"zero_optimization.{section}.device",
                "not-installed",
            )


class TrainedWeights:
    """The parameters of a network that an engine trains: master weights, or their averages.

    The master weights are float32 in every precision, and the network computes with their rounded
    values, so a file of them gives the same network when it is loaded in that precision.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, network: nn.Module) -> None:
        self._engine = engine
        self._parameters = {n: p for n, p in network.named_parameters() if p.requires_grad}

    @property
    def shapes(self) -> dict[str, Size]:
        """Names, in the network's order, and whole shapes."""
        return {
            name: getattr(parameter, "ds_shape", parameter.shape)
            for name, parameter in self._parameters.items()
        }

    def averaged(self, wanted: bool) -> AbstractContextManager[None]:
        """Within, the values are the moving averages (if ``wanted``)."""
        return averages_in_place(self._engine.optimizer.optimizer) if wanted else nullcontext()

    def gather(self, name: str) -> Tensor:
        """One parameter, whole, float32, on the device; all ranks call together."""
        value = safe_get_full_fp32_param(self._parameters[name])
        assert value is not None, f"DeepSpeed keeps no master weights of {name}"
        return value.detach()
