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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from .errors import EXIT_OUTSIDE, CdpoError, OutsideError, RecipeError
from .recipe import Recipe
from .recipe_file import parse_command_line
from .reporting.console import Terminal

SECONDS_BEFORE_SPEAKING = 3.0
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Ranks:
    """This process among its peers. Collectives take host objects and do nothing for one rank."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

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
        with joined_ranks(recipe.train.threads) as ranks, run_lock(ranks, Path(recipe.run_dir)):
            main(ranks, recipe, terminal)
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


def leave(code: int) -> None:
    """Exit at once: an orderly teardown would wait in collectives for peers that have failed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def joined_ranks(threads: int = 0) -> Iterator[Ranks]:
    """Join the process group the launcher describes, or make a group of one."""
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
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=COLLECTIVE_TIMEOUT)
    try:
        yield Ranks(rank, world_size, local_rank, device)
    finally:
        # On an error peers may be waiting in a collective; tearing down would join them.
        if sys.exc_info()[0] is None:
            dist.destroy_process_group()


def local_world_size(world_size: int) -> int:
    """Ranks on this machine, as the launcher says; all of them where it does not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world_size)))


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


class StopSignal:
    """SIGTERM (a scheduler's preemption) and SIGINT as a wish, granted between two steps."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopSignal:
        self._previous = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: do not insist on a checkpoint
        self.requested = True


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
