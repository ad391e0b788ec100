"""What a profiler's trace of training steps says: time, launches and waits of each phase.

A trace is the JSON that `torch.profiler` writes for Chrome and Perfetto. Work of the GPU belongs to
the phase in which the host launched it, on whichever thread: autograd launches a backward from a
thread of its own. Times are in microseconds there and in milliseconds here.
"""

import gzip
import json
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdpo.engine.basics.phases import PHASES

STEP = "ProfilerStep#"
DEVICE_WORK = {"kernel", "gpu_memcpy", "gpu_memset"}
RUNTIME = {"cuda_runtime", "cuda_driver"}
# Calls that return when the GPU is done. What PyTorch waits for after a copy to the host is one of
# them, so the copies themselves are counted apart.
WAITS = {
    *("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"),
    *("cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize"),
}

Event = dict[str, Any]


@dataclass
class PhaseTotals:
    """Of all steps together."""

    calls: int = 0
    host_ms: float = 0.0
    device_ms: float = 0.0
    waits: int = 0


@dataclass
class KernelTotals:
    """Of all steps together."""

    calls: int = 0
    device_ms: float = 0.0


@dataclass
class StepTrace:
    """The steps of a trace; ``phases`` has all of them in order, and "other" for what is left."""

    num_steps: int
    host_ms: float
    busy_ms: float
    """Time in which the GPU was doing anything; 0 without one."""
    copies_to_host: int
    phases: dict[str, PhaseTotals]
    kernels: dict[str, KernelTotals]
    """By name, the costliest first."""

    @property
    def device_ms(self) -> float:
        """Time of all the GPU's work, counted twice where two streams work at once."""
        return sum(phase.device_ms for phase in self.phases.values())

    @property
    def waits(self) -> int:
        """Calls in which the host waited for the GPU."""
        return sum(phase.waits for phase in self.phases.values())


class Spans:
    """Intervals of the host's time that do not overlap, each with a name."""

    def __init__(self, events: Iterable[Event]) -> None:
        self.events = sorted(events, key=lambda event: event["ts"])
        self._starts = [event["ts"] for event in self.events]

    def at(self, time: float) -> Event | None:
        """The interval that holds this moment, if one does."""
        index = bisect_right(self._starts, time) - 1
        if index < 0:
            return None
        event = self.events[index]
        return event if time < event["ts"] + event["dur"] else None


def read_trace(path: Path) -> StepTrace:
    """Summarise a `.json.gz` trace of at least one profiler step."""
    with gzip.open(path, "rt") as file:
        return summarise(json.load(file)["traceEvents"])


def summarise(events: list[Event]) -> StepTrace:
    """The steps among the events of a trace."""
    events = [event for event in events if event.get("ph") == "X"]
    named = [event for event in events if event.get("cat") == "user_annotation"]
    steps = Spans(event for event in named if event["name"].startswith(STEP))
    if not steps.events:
        raise ValueError("the trace holds no step: it must be recorded with profiler.step()")
    phases = Spans(e for e in named if e["name"] in PHASES and steps.at(e["ts"]))
    called = [e for e in events if e.get("cat") in RUNTIME and steps.at(e["ts"])]
    launches = {e["args"].get("correlation"): e["ts"] for e in called}
    work = [
        (launches[event["args"]["correlation"]], event)
        for event in events
        if event.get("cat") in DEVICE_WORK and event["args"].get("correlation") in launches
    ]
    host_ms = sum(event["dur"] for event in steps.events) / 1e3
    return StepTrace(
        num_steps=len(steps.events),
        host_ms=host_ms,
        busy_ms=_covered([event for _, event in work]) / 1e3,
        copies_to_host=sum("DtoH" in event["name"] for _, event in work),
        phases=_phase_totals(host_ms, phases, called, work),
        kernels=_kernel_totals(event for _, event in work if event["cat"] == "kernel"),
    )


def _phase_totals(
    host_ms: float, phases: Spans, called: list[Event], work: list[tuple[float, Event]]
) -> dict[str, PhaseTotals]:
    """``called`` are the host's calls of CUDA; ``work`` is the GPU's, with when it was launched."""
    totals = {name: PhaseTotals() for name in (*PHASES, "other")}

    def phase_at(time: float) -> PhaseTotals:
        span = phases.at(time)
        return totals[span["name"] if span else "other"]

    totals["other"].host_ms = host_ms
    for event in phases.events:
        totals[event["name"]].calls += 1
        totals[event["name"]].host_ms += event["dur"] / 1e3
        totals["other"].host_ms -= event["dur"] / 1e3
    for event in called:
        phase_at(event["ts"]).waits += event["name"] in WAITS
    for launched, event in work:
        phase_at(launched).device_ms += event["dur"] / 1e3
    return totals


def _kernel_totals(events: Iterable[Event]) -> dict[str, KernelTotals]:
    kernels: dict[str, KernelTotals] = defaultdict(KernelTotals)
    for event in events:
        kernel = kernels[base_name(event["name"])]
        kernel.calls += 1
        kernel.device_ms += event["dur"] / 1e3
    return dict(sorted(kernels.items(), key=lambda item: item[1].device_ms, reverse=True))


def base_name(kernel: str) -> str:
    """A kernel's name without return type, namespaces, template and parameters, as ncu matches it.

    "void at::native::reduce_kernel<512, 1>(at::Tensor)" -> "reduce_kernel"
    """
    head = re.split(r"[<(]", kernel.replace("(anonymous namespace)::", ""), maxsplit=1)[0]
    return head.split("::")[-1].split(" ")[-1] or kernel


def _covered(events: list[Event]) -> float:
    """Length of the union of intervals: streams may work at the same time."""
    total, end = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event["ts"]):
        start, stop = max(event["ts"], end), event["ts"] + event["dur"]
        total += max(0.0, stop - start)
        end = max(end, stop)
    return total
