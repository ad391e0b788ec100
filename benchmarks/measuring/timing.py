"""Times of alternatives taken in turns in one process, on a GPU's clock or a CPU's.

Taking turns, in an order that is reversed every round, puts drifts of clock rate and temperature
and neighbours' load on all alternatives alike, so that their ratios hold where the times do not.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from math import ceil
from typing import Any, NamedTuple

import torch

Run = Callable[[], Any]
Prepare = Callable[[], Run]  # does what is not timed and returns what is

FLUSH_BYTES = 512 << 20  # several times the L2 of any GPU
COPY_BYTES = 1 << 30
MIN_ROUNDS, MAX_ROUNDS = 5, 200
WARM_UP_ROUNDS = 2


class Spread(NamedTuple):
    """Median, and the 20th and 80th percentile."""

    p20: float
    median: float
    p80: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        tenths = statistics.quantiles(values, n=10, method="inclusive")
        return cls(tenths[1], statistics.median(values), tenths[7])


class Times(NamedTuple):
    """Milliseconds of every round: on the device, and of the host's launching."""

    device: list[float]
    host: list[float]


class CpuClock:
    """Wall time; caches are left as they are."""

    caches = "left as the previous repetition leaves them"
    device = torch.device("cpu")

    def measure(self, run: Run, host_ms: float) -> tuple[float, float]:
        begin = time.perf_counter()
        run()
        elapsed = (time.perf_counter() - begin) * 1e3
        return elapsed, elapsed


class CudaClock:
    """CUDA events, with L2 overwritten before every repetition.

    The overwriting also lets the host run ahead: while the GPU is busy with it, all launches get
    into the queue, so that the device's time holds no waiting for the host. The host's time is told
    beside it: where that is longer, a program that does nothing else is bound by launches.
    """

    caches = "L2 is overwritten before every repetition"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffer = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
        self._start, self._stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush_ms = 1.0  # until it is known
        self._flush_ms = min(self.measure(self._buffer.zero_, 0.0)[0] for _ in range(5))

    def measure(self, run: Run, host_ms: float) -> tuple[float, float]:
        """Milliseconds of device and host; `host_ms` is how long the host is expected to take."""
        for _ in range(1 + ceil(2 * host_ms / self._flush_ms)):
            self._buffer.zero_()
        self._start.record()
        begin = time.perf_counter()
        run()
        host = (time.perf_counter() - begin) * 1e3
        self._stop.record()
        self._stop.synchronize()
        return self._start.elapsed_time(self._stop), host


class StepClock:
    """For work as long as a training step, from an idle device to an idle device.

    On a GPU wall time, the host's launching in it as it is in a run. On a CPU the time that the
    processor gave to this process, over all its threads: other programs' load is not in it.
    """

    caches = "left as the previous repetition leaves them"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        on_gpu = device.type == "cuda"
        self._now = time.perf_counter if on_gpu else time.process_time

    def measure(self, run: Run, host_ms: float) -> tuple[float, float]:
        self._wait()
        begin = self._now()
        run()
        self._wait()
        elapsed = (self._now() - begin) * 1e3
        return elapsed, elapsed

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


Clock = CpuClock | CudaClock | StepClock


def clock_of(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def take_turns(tasks: Mapping[str, Prepare], clock: Clock, budget_s: float) -> dict[str, Times]:
    """Time every task once a round, for about `budget_s` seconds."""
    for prepare in tasks.values():
        prepare()()  # compiles, perhaps
    expected = {name: clock.measure(prepare(), 0.0)[1] for name, prepare in tasks.items()}
    for _ in range(WARM_UP_ROUNDS):
        begin = time.perf_counter()
        for name, prepare in tasks.items():
            host_ms = clock.measure(prepare(), expected[name])[1]
            expected[name] = min(host_ms, expected[name])
        round_s = time.perf_counter() - begin
    num_rounds = min(max(int(budget_s / round_s), MIN_ROUNDS), MAX_ROUNDS)
    times = {name: Times([], []) for name in tasks}
    order = list(tasks)
    for _ in range(num_rounds):
        for name in order:
            device_ms, host_ms = clock.measure(tasks[name](), expected[name])
            times[name].device.append(device_ms)
            times[name].host.append(host_ms)
        order.reverse()
    return times


def copy_bandwidth(clock: Clock) -> float:
    """GB/s, read and written, of a large copy on the device: what memory gives in practice."""
    source = torch.randn(COPY_BYTES // 4, device=clock.device)
    target = torch.empty_like(source)
    times = take_turns({"copy": lambda: lambda: target.copy_(source)}, clock, budget_s=0.5)
    return 2 * COPY_BYTES / statistics.median(times["copy"].device) / 1e6


def empty_ms(clock: Clock) -> float:
    """What the clock shows when nothing runs: times of a few of these mean little."""
    times = take_turns({"nothing": lambda: lambda: None}, clock, budget_s=0.1)
    return statistics.median(times["nothing"].device)
