"""What every verb does around its work: quiet libraries, ranks, the run lock, exit codes.

A verb is written as ``main(ranks, recipe, terminal)`` and started with :func:`run_verb`. Under the
``deepspeed`` or ``torchrun`` launcher each process is one rank; plain ``python`` is one rank alone.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .errors import (
    EXIT_OUTSIDE,
    EXIT_STOPPED,
    CdpoError,
    OutsideError,
    RecipeError,
    StopRequested,
)
from .recipe import Recipe
from .recipe_file import parse_command_line
from .reporting.console import Terminal
from .stopping import StopSignal

Item = TypeVar("Item")
SECONDS_BEFORE_SPEAKING = 3.0
STOPPING = "cdpo/stopping"  # key in the store that all ranks share


@dataclass(frozen=True)
class Ranks:
    """This process among its peers. Collectives take host objects and do nothing for one rank."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    stop: StopSignal = field(default_factory=StopSignal)
    """Whether this rank has been asked to stop."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def local_size(self) -> int:
        """Ranks on this machine."""
        return local_world_size(self.world_size)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def agree(self, error: Exception | None) -> None:
        """Raise on every rank if any rank failed, so that none waits for a peer that has left."""
        for peer_error in self.gather(error):
            if peer_error is not None:
                raise peer_error

    def together(self, work: Callable[[], object]) -> None:
        """Run ``work`` on every rank; where any fails with a CdpoError, all raise the first's."""
        error: CdpoError | None = None
        try:
            work()
        except CdpoError as exc:
            error = exc
        self.agree(error)

    def on_first(self, work: Callable[[], Any]) -> Any:
        """Run ``work`` on rank 0 alone; all ranks get its result, or raise what it raised."""
        result: Any = None
        error: Exception | None = None
        if self.is_first:
            try:
                result = work()
            except Exception as exc:  # whatever it is, the others must not wait for a result
                error = exc
        result, error = self.from_first((result, error))
        if error is not None:
            raise error
        return result

    def share(self, items: Sequence[Any]) -> Sequence[Any]:
        """This rank's part of some items: every world-size-th, so parts differ by at most one."""
        return items[self.rank :: self.world_size]

    def until_stopped(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, until any rank is asked to stop; between two of them is a safe point.

        Whoever stops early goes where all ranks meet next, with what it has done kept there.
        """
        for item in items:
            if self._why_stop():
                return
            yield item

    def meet(self) -> None:
        """Wait until every rank is here. Raises StopRequested on all if any was asked to stop."""
        if reason := self.asked_to_stop():
            raise StopRequested(
                f"stopped on request ({reason}); the same command goes on from there"
            )

    def asked_to_stop(self) -> str:
        """Why the ranks are to stop, or nothing; all ask together, and get the same answer."""
        return next(filter(None, self.gather(self._why_stop())), "")

    def hear_of_stop(self) -> bool:
        """Whether any rank has been asked to stop, as far as this one knows: for waits in which it
        meets nobody.
        """
        return bool(self._why_stop())

    def _why_stop(self) -> str:
        """Known without waiting for anybody: ranks leave word in the store they have in common."""
        if self.stop.requested or self.world_size == 1:
            return self.stop.reason
        store = dist.distributed_c10d._get_default_store()
        return store.get(STOPPING).decode() if store.check([STOPPING]) else ""


def run_verb(
    verb: str,
    main: Callable[[Ranks, Recipe, Terminal], None],
    dry_run: Callable[[int, Recipe, Terminal], None] | None = None,
) -> None:
    """Parse the command line, run ``main`` on this rank and leave with the contract's exit code.

    ``dry_run`` takes the number of ranks to plan for; it joins none, and writes nothing.
    """
    quieten_libraries()
    terminal = Terminal(enabled=int(os.environ.get("RANK", "0")) == 0)
    try:
        asked = parse_command_line(verb, sys.argv[1:])
        recipe = asked.recipe
        if asked.dry_run and dry_run is not None:
            dry_run(asked.world_size or int(os.environ.get("WORLD_SIZE", "1")), recipe, terminal)
            return
        with (
            stop_signal(recipe.cluster.grace_seconds) as stop,
            joined_ranks(recipe.train.threads, recipe.cluster.timeout_minutes, stop) as ranks,
            run_lock(ranks, Path(recipe.run_dir)),
        ):
            main(ranks, recipe, terminal)
    except StopRequested as error:  # on all ranks together
        terminal.error(str(error))
        leave(error.exit_code)
    except CdpoError as error:
        if not terminal.enabled:
            # Mostly rank 0 fails alike and speaks for all, and the launcher ends this rank while it
            # waits. Whoever is still here failed alone and must say so itself.
            time.sleep(SECONDS_BEFORE_SPEAKING)
            terminal = Terminal()
        terminal.error(str(error))
        leave(error.exit_code)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        Terminal().error(f"no space left on the disk of {error.filename or recipe.run_dir}")
        leave(EXIT_OUTSIDE)
    except KeyboardInterrupt:
        leave(128 + signal.SIGINT)
    except RuntimeError as error:
        if not _is_of_a_collective(error):
            raise
        time.sleep(SECONDS_BEFORE_SPEAKING)  # a peer that failed has said why, and ends this one
        rank = os.environ.get("RANK", "0")
        reason = str(error).strip().split("\n")[0]
        Terminal().error(
            f"rank {rank} has lost the others, or waited for them longer than "
            f"cluster.timeout_minutes={recipe.cluster.timeout_minutes:g}: {reason}"
        )
        leave(EXIT_OUTSIDE)


def _is_of_a_collective(error: RuntimeError) -> bool:
    """Gloo raises plain RuntimeErrors, which name its source files."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def stop_signal(grace: float) -> StopSignal:
    """What watches for requests to stop; too long after one it ends the process."""

    def overdue(reason: str) -> None:
        rank = os.environ.get("RANK", "0")
        Terminal().error(
            f"rank {rank} came to no safe point within cluster.grace_seconds={grace:g} of the "
            f"request to stop ({reason}): it leaves with what is committed, from which the same "
            "command goes on"
        )
        leave(EXIT_STOPPED)

    return StopSignal(grace, overdue, watch_parent="LOCAL_RANK" in os.environ)


def leave(code: int) -> None:
    """Exit at once: an orderly teardown would wait in collectives for peers that have failed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def joined_ranks(
    threads: int = 0, timeout_minutes: float = 30.0, stop: StopSignal | None = None
) -> Iterator[Ranks]:
    """Join the process group the launcher describes, or make a group of one.

    No rank waits for another longer than ``timeout_minutes``.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available()
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise OutsideError(
            f"rank {rank} wants GPU {local_rank} but this machine has {torch.cuda.device_count()}: "
            "start fewer ranks with --num_gpus"
        )
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        local_world = local_world_size(world_size)
        torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // local_world))
    if world_size == 1:
        for name, value in _group_of_one().items():
            os.environ.setdefault(name, value)
    timeout = timedelta(minutes=timeout_minutes)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout)
    stop = stop or StopSignal()
    store = dist.distributed_c10d._get_default_store()
    stop.announce_by(lambda reason: store.set(STOPPING, reason))
    try:
        yield Ranks(rank, world_size, local_rank, device, stop)
    finally:
        # On an error peers may be waiting in a collective; tearing down would join them.
        if sys.exc_info()[0] is None:
            dist.destroy_process_group()


def local_world_size(world_size: int) -> int:
    """Ranks on this machine, as the launcher says; all of them where it does not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world_size)))


def bound_waits(timeout_minutes: float) -> None:
    """Give the groups of ranks that libraries have made since the limit of our own.

    A new group has PyTorch's default instead, 10 minutes on GPUs and 30 on CPUs.
    """
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(minutes=timeout_minutes), group)


def _group_of_one() -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@contextmanager
def run_lock(ranks: Ranks, run_dir: Path) -> Iterator[None]:
    """Hold the run folder for the life of the process: two runs in it would destroy each other."""
    handle = None

    def take() -> None:
        nonlocal handle
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            handle = open(run_dir / ".lock", "w")  # noqa: SIM115 (held, not scoped)
        except OSError as error:
            raise RecipeError(f"run_dir {run_dir} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RecipeError(
                f"run_dir {run_dir} is in use by another process: wait for it, or give another"
            ) from None

    ranks.on_first(take)
    try:
        yield
    finally:
        if handle is not None:
            handle.close()


def quieten_libraries() -> None:
    """Keep the terminal for the run's own lines. Takes effect on libraries imported afterwards."""
    warnings.filterwarnings("ignore")
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "DIFFUSERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    # DeepSpeed gives its logger a level when it is imported; a filter survives that.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
