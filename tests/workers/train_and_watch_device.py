"""The train verb as if the CPU were an asynchronous device: where the host waits for it, and how
many operations each phase of a step sends there.

The pretended device is `cpu:0`; the host is `cpu`, and what lies there is marked. Writes
``device-<rank>.json`` into the folder named by WATCH_FOLDER: for the steps from WATCH_FROM on, how
many there were, each place where the host waits with its count, and the operations of each phase
(views and allocations, which launch nothing, left out).
"""

from __future__ import annotations

import json
import os
import traceback
from collections import Counter
from contextlib import ExitStack, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from cdpo.engine.basics import phases
from cdpo.engine.ranks import Ranks, run_verb
from cdpo.engine.train import main
from cdpo.engine.training.trainer import Trainer
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE, HOST = torch.device("cpu", 0), torch.device("cpu")
FIRST = int(os.environ.get("WATCH_FROM", "2"))
OURS = ("cdpo/", "engine/", "kernels/", "deepspeed", "peft/", "diffusers/", "torch/optim")
# What looks at values to know the size of its result, or is asked for a value.
LOOKS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "repeat_interleave.Tensor")

watching = False
at_phase = "step"
steps = 0
waits: Counter[str] = Counter()
operations: Counter[str] = Counter()


def waited(what: str) -> None:
    if not watching:
        return
    frames = [
        f"{frame.filename.split('site-packages/')[-1].split('/cdpo/')[-1]}:{frame.lineno}"
        for frame in traceback.extract_stack()
        if any(part in frame.filename for part in OURS) and "workers/" not in frame.filename
    ]
    waits[f"{what} in {at_phase}: {' < '.join(reversed(frames[-4:]))}"] += 1


def on_host(tensor: Tensor) -> bool:
    return getattr(tensor, "on_host", False)


def put(result: Any, host: bool) -> Any:
    """Mark where the tensors of a result lie."""
    if isinstance(result, Tensor):
        result.on_host = host
    elif isinstance(result, list | tuple):
        for item in result:
            put(item, host)
    return result


def tensors_in(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list | tuple):
        return []
    return [tensor for value in values for tensor in tensors_in(value)]


def destination(args: Any, kwargs: Any) -> torch.device | None:
    for value in (*args[1:], *kwargs.values()):
        if isinstance(value, torch.device | str):
            return torch.device(value)
        if isinstance(value, Tensor):
            return HOST if on_host(value) else DEVICE
    return None


class Apart(TorchFunctionMode):
    """Keeps host and device apart, and notes copies that wait."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func == Tensor.device.__get__:
            return HOST if on_host(args[0]) else DEVICE
        if name in ("cpu", "tolist", "numpy", "to", "__array__"):
            return self.moved(name, func, args, kwargs)
        given = tensors_in((args, kwargs))
        if name == "__get__" or not given:
            wanted = kwargs.get("device")
            device = None if wanted is None else torch.device(wanted)
            to_device = device is not None and device.index is not None
            if to_device and name in ("tensor", "as_tensor"):
                waited(f"torch.{name} with a device")
            result = func(*args, **kwargs)
            return result if given else put(result, not to_device)
        result = func(*args, **kwargs)
        wanted = kwargs.get("device")
        if wanted is not None:
            return put(result, torch.device(wanted).index is None)
        return put(result, all(map(on_host, given)))

    def moved(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        source = args[0]
        target = destination(args, kwargs) if name == "to" else HOST
        result = func(*args, **kwargs)
        if target is None:  # a change of dtype
            return put(result, on_host(source))
        to_host = target.index is None
        if to_host == on_host(source):
            return put(result, to_host) if result is not source else result
        if to_host or not kwargs.get("non_blocking"):
            waited(f"Tensor.{name}")
        return put(result.detach() if isinstance(result, Tensor) else result, to_host)


class Watch(TorchDispatchMode):
    """Counts operations, and notes those that look at values on the device."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.name().removeprefix("aten::")
        given = tensors_in((args, kwargs))
        if watching and not (given and all(map(on_host, given))):
            masks = [t for t in tensors_in(args[1:2]) if t.dtype in (torch.bool, torch.uint8)]
            if name.startswith(LOOKS) or (name.startswith("index") and masks):
                waited(name)
            if not (op.is_view or "empty" in name or name.startswith(LOOKS)):
                operations[at_phase] += 1
        return op(*args, **(kwargs or {}))


class Named:
    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        global at_phase
        self.before, at_phase = at_phase, self.name

    def __exit__(self, *error: object) -> None:
        global at_phase
        at_phase = self.before


class Stream:
    def synchronize(self) -> None:
        waited("stream.synchronize")

    def wait_stream(self, other: object) -> None: ...
    def wait_event(self, event: object) -> None: ...
    def record_event(self, *event: object) -> Event:
        return Event()


class Event:
    def __init__(self, **options: object) -> None: ...
    def record(self, *stream: object) -> None: ...
    def wait(self, *stream: object) -> None: ...
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        waited("event.synchronize")


def pretend() -> None:
    """Let DeepSpeed take the CPU for a device with streams, `cpu:0`."""
    kind, stream = type(get_accelerator()), Stream()
    for name in ("is_synchronized_device", "resolves_data_dependency"):
        setattr(kind, name, lambda self: False)
    kind.handles_memory_backpressure = lambda self: True
    kind.synchronize = lambda self, *device: waited("device.synchronize")
    kind.current_device_name = kind.device_name = lambda self, *index: str(DEVICE)
    kind.Stream = lambda self, *args, **options: stream
    kind.current_stream = kind.default_stream = lambda self, *device: stream
    kind.stream = lambda self, stream: nullcontext()
    kind.Event = property(lambda self: Event)
    Tensor.record_stream = lambda *args: None
    from_numpy = torch.from_numpy  # which no mode is told of
    torch.from_numpy = lambda array: put(from_numpy(array), True)


next_pairs, take_step, run = Trainer._next_pairs, Trainer._take_step, Trainer._run


def watched_pairs(self: Trainer) -> Any:
    global watching
    watching = steps >= FIRST
    pairs = next_pairs(self)
    for field in fields(pairs):
        put(getattr(pairs, field.name), True)
    return pairs


def watched_step(self: Trainer, pairs: Any) -> bool:
    global watching, steps
    taken = take_step(self, pairs)
    watching = False
    steps += 1
    return taken


def watched_run(self: Trainer, *args: Any) -> None:
    with ExitStack() as modes:
        modes.enter_context(Watch())
        modes.enter_context(Apart())
        run(self, *args)


def on_device(ranks: Ranks, *args: Any) -> None:
    object.__setattr__(ranks, "device", DEVICE)
    main(ranks, *args)


pretend()
phases.record_function = Named
Trainer._next_pairs, Trainer._take_step, Trainer._run = watched_pairs, watched_step, watched_run
run_verb("train", on_device)
path = Path(os.environ["WATCH_FOLDER"], f"device-{os.environ.get('RANK', '0')}.json")
path.write_text(json.dumps({"steps": steps - FIRST, "waits": waits, "operations": operations}))
