"""The networks of a micro-batch as CUDA graphs: thousands of launches become two.

One graph holds all forward passes and the loss, the other the gradients of what is trained. Into
the first go the tensors of a batch, into the second the gradient of the loss, which has all factors
in it (accumulation, fp16's scale); copies of them lie where the graphs read. What comes out is
handed to autograd as if it had been computed there, so everything else stays as it is and outside:
noise and prompts, the hooks of growing adapters and of DeepSpeed, metrics, the optimiser.

So a graph depends on nothing but sizes and addresses. If one of them changes it is made again.
Stages, tiers, learning rates, evaluations and pictures change none. Gradients are taken of aliases
of what is trained, for the parameters themselves have hooks, and belong to the default stream, for
which nothing that is captured may wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..basics.errors import told_by
from ..basics.phases import phase
from ..display.terminal import Terminal
from ..objectives import Loss, TrainingBatch
from ..recipe import Recipe

# Passes in which libraries choose kernels and allocate what they keep. Convolutions that are timed
# (`speed.rounding: free`) are so there, for a capture may not wait: cuDNN's choices are kept by
# thread, shape and alignment, which are those of the capture in either pass.
WARM_UPS = 3
MOST_CAPTURES = 4  # then whatever changes all the time is no reason to capture all the time

T = TypeVar("T")


class Recorder(Protocol):
    """Records work on a device once, to be repeated on what then lies at the same addresses."""

    def warm_up(self, work: Callable[[], object]) -> None:
        """Do the work as often as it takes to come to rest."""
        ...

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """What the work returns, whose content is not there yet, and what puts it there."""
        ...


class CudaRecorder:
    """Records CUDA graphs that share their memory: they are to be replayed in this order."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], object]) -> None:
        current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                work()
        current.wait_stream(aside)

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Of this thread alone: others pin memory for the next pairs meanwhile, and watch NCCL.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = work()
        finally:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own behind
        return result, graph.replay


@dataclass(frozen=True)
class _Recorded:
    """One capture: where it reads, where its results lie, and what makes them."""

    signature: object
    addresses: list[int]
    inputs: list[Tensor]
    gradient: Tensor
    """() that of the loss."""
    loss: Loss
    gradients: Tensor
    """Of all that is trained and takes part, flat."""
    shapes: list[torch.Size | None]
    """Of each trained weight; None of one that takes no part."""
    play_forward: Callable[[], None]
    play_backward: Callable[[], None]

    def forward(self, given: list[Tensor]) -> Loss:
        for mine, new in zip(self.inputs, given, strict=True):
            mine.copy_(new)
        with phase("policy"):  # and all other networks
            self.play_forward()
        return _with_tensors(self.loss, map(torch.clone, _tensors_of(self.loss)))

    def backward(self, gradient: Tensor) -> list[Tensor | None]:
        self.gradient.copy_(gradient)
        self.play_backward()
        # A copy: under ZeRO-1 gradients wait as they are for those of the next micro-batch.
        sizes = [shape.numel() for shape in self.shapes if shape is not None]
        parts = iter(self.gradients.clone().split(sizes))
        return [None if shape is None else next(parts).view(shape) for shape in self.shapes]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recorded: _Recorded, loss: Tensor, *trained: Tensor) -> Tensor:
        ctx.recorded = recorded
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (None, None, *ctx.recorded.backward(gradient))


class CapturedLoss:
    """A loss over batches that is captured when it is asked for first, and replayed from then on.

    Where that does not work it says so once, and computes as it would without.
    """

    def __init__(
        self,
        networks: nn.Module,
        loss_of: Callable[[TrainingBatch], Loss],
        terminal: Terminal,
        recorder: Callable[[], Recorder] = CudaRecorder,
    ) -> None:
        """To be called when the networks are where they stay.

        Args:
            networks: all that ``loss_of`` asks.
            loss_of: a batch's loss, which looks at no value on the device.
            terminal: gets a line for each capture.
            recorder: makes what records one capture.
        """
        self.captures = 0
        """How often there was something to capture; 0 also says that nothing is replayed."""
        self._loss_of = loss_of
        self._terminal = terminal
        self._recorder = recorder
        self._read = [*networks.parameters(), *networks.buffers()]
        self._trained = [p for p in networks.parameters() if p.requires_grad]
        self._recorded: _Recorded | None = None
        self._given_up = False
        numbers = {id(weight): number for number, weight in enumerate(self._trained)}
        self._places = [
            (part, name, numbers[id(weight)])
            for part in networks.modules()
            for name, weight in part._parameters.items()
            if id(weight) in numbers
        ]

    def __call__(self, batch: TrainingBatch) -> Loss:
        given = _tensors_of(batch)
        recorded = None if self._given_up else self._fitting(batch, given)
        if recorded is None:
            return self._loss_of(batch)
        loss = recorded.forward(given)
        return replace(loss, loss=_Replay.apply(recorded, loss.loss, *self._trained))

    def _fitting(self, batch: TrainingBatch, given: list[Tensor]) -> _Recorded | None:
        """What can be replayed for a batch, captured anew if need be; None if nothing can."""
        signature, addresses = _signature_of(batch), [tensor.data_ptr() for tensor in self._read]
        found = self._recorded
        if found is not None and (found.signature, found.addresses) == (signature, addresses):
            return found
        again = ""
        if found is not None:
            what = "sizes of a batch" if found.signature != signature else "places of weights"
            again = f" again, for other {what}"
        self._recorded = found = None  # its memory serves the next
        if self.captures == MOST_CAPTURES:
            self._give_up(f"after {self.captures} captures it would be captured{again}")
            return None
        try:
            self._recorded = self._record(batch, given, signature, addresses)
        except RuntimeError as error:  # of CUDA, of its memory, of whatever may not be captured
            self._give_up(f"it cannot be captured ({told_by(error)})")
            return None
        self.captures += 1
        self._terminal.line(f"cuda graph: a micro-batch is captured{again}")
        return self._recorded

    def _give_up(self, why: str) -> None:
        self._given_up, self.captures = True, 0
        self._terminal.warn(f"cuda graph: {why}; micro-batches are computed without from here on")

    def _record(
        self, batch: TrainingBatch, given: list[Tensor], signature: object, addresses: list[int]
    ) -> _Recorded:
        inputs = [tensor.clone() for tensor in given]
        fixed = _with_tensors(batch, iter(inputs))
        gradient = torch.ones((), device=batch.noisy.device)
        recorder = self._recorder()
        with self._aliases() as aliases:

            def forward() -> Loss:
                return self._loss_of(fixed)

            def backward(loss: Loss) -> tuple[Tensor, list[torch.Size | None]]:
                found = torch.autograd.grad(loss.loss, aliases, gradient, allow_unused=True)
                flat = torch.cat([part.flatten() for part in found if part is not None])
                return flat, [None if part is None else part.shape for part in found]

            recorder.warm_up(lambda: backward(forward()))
            loss, play_forward = recorder.record(forward)
            (flat, shapes), play_backward = recorder.record(lambda: backward(loss))
        return _Recorded(
            signature,
            addresses,
            inputs,
            gradient,
            _with_tensors(loss, (tensor.detach() for tensor in _tensors_of(loss))),
            flat,
            shapes,
            play_forward,
            play_backward,
        )

    @contextmanager
    def _aliases(self) -> Iterator[list[Tensor]]:
        """Within, the networks compute with aliases of what is trained."""
        aliases = [weight.detach().requires_grad_() for weight in self._trained]
        try:
            for part, name, number in self._places:
                part._parameters[name] = aliases[number]  # type: ignore[assignment]
            yield aliases
        finally:
            for part, name, number in self._places:
                part._parameters[name] = self._trained[number]  # type: ignore[assignment]


def hindrance(recipe: Recipe, device: torch.device, zero: Mapping[str, Any]) -> str | None:
    """What keeps a run from capturing its micro-batches, if anything does; ``zero`` is the section
    of its DeepSpeed config.
    """
    speed, adapter = recipe.speed, recipe.adapter
    offloads = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    found = {
        "there is no CUDA device": device.type != "cuda",
        "adapter.type=full": adapter.type == "full",
        "adapter.dropout draws anew": adapter.dropout > 0,
        "ZeRO-3 gathers weights while it computes": zero["stage"] == 3,
        "zero_optimization.offload_optimizer": offloads,
        f"speed.compile={speed.compile}": speed.compile != "off",
        "weights in fewer bits are made whole anew each time": bool(recipe.model.quantization),
        "speed.activation_checkpointing": speed.activation_checkpointing,
        "speed.frozen_cache asks about other pairs each time": bool(speed.frozen_cache),
    }
    return next((why for why, hinders in found.items() if hinders), None)


def _parts_of(value: Any) -> dict[str, Any]:
    """The parts of what holds tensors, by name; none of anything else."""
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, dict):
        return value
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return dict(value._asdict())
    return {}


def _tensors_of(value: Any) -> list[Tensor]:
    """All tensors within a batch or a loss, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in _parts_of(value).values() for tensor in _tensors_of(part)]


def _with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same with other tensors in place of these."""
    if isinstance(value, Tensor):
        return next(tensors)
    parts = {name: _with_tensors(part, tensors) for name, part in _parts_of(value).items()}
    if is_dataclass(value):
        return replace(value, **parts)  # type: ignore[type-var]
    return type(value)(**parts) if parts else value


def _signature_of(value: Any) -> object:
    """What two batches share that differ in nothing but the content of their tensors."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    parts = _parts_of(value)
    return {name: _signature_of(part) for name, part in parts.items()} if parts else value
