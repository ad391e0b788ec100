"""What every verb does around its work: quiet libraries, ranks, the run lock, exit codes.

A verb is written as ``main(ranks, recipe, terminal)`` and started with :func:`run_verb`. Under the
``deepspeed`` or ``torchrun`` launcher each process is one rank; plain ``python`` is one rank alone.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import NoReturn
from uuid import uuid4

import torch
import torch.distributed as dist

from ..basics.errors import (
    DISK_FULL,
    EXIT_DEFECT,
    EXIT_OUTSIDE,
    EXIT_STOPPED,
    CdpoError,
    OutsideError,
    RecipeError,
    StopRequested,
    redact,
    told_by,
)
from ..basics.files import replacing, user_cache
from ..basics.memory import is_out_of_memory
from ..display.terminal import Terminal
from ..recipe import Recipe
from ..recipe.command_line import parse_command_line
from .group import Ranks
from .launcher import launched
from .places import check_place, check_places
from .run_lock import RunLock, refuse_other_folder
from .signals import LISTEN_EVERY, Peers, StopSignal

SECONDS_BEFORE_SPEAKING = 3.0
TRACEBACK = "traceback.txt"  # in the run folder, or else in the user's cache
SECONDS_TO_ANSWER = 10.0  # for rank 0's store, once something listens at its port


def run_verb(
    verb: str,
    main: Callable[..., None],
    dry_run: Callable[[int, Recipe, Terminal], None] | None = None,
) -> None:
    """Parse the command line, run ``main`` on this rank and leave with the contract's exit code.

    ``main(ranks, recipe, terminal)`` is given ``allow_change``, the keys of `--allow-change`, where
    there are some. ``dry_run`` takes the number of ranks to plan for; it joins none, and writes
    nothing.
    """
    quieten_libraries()
    # Libraries that a verb imports make a million objects that stay. With Python's own threshold of
    # 700, looking for garbage among them takes a tenth of the processor time of a start.
    gc.freeze()
    gc.set_threshold(10_000)
    peers = Peers(follow=leave)
    try:
        world = launched()
    except RecipeError as error:  # nobody knows which rank it is, and which one speaks for all
        Terminal().error(str(error))
        leave(error.exit_code)
    terminal = Terminal(enabled=world.rank == 0)
    kept_in = [user_cache()]
    try:
        asked = parse_command_line(verb, sys.argv[1:])
        recipe = asked.recipe
        kept_in.insert(0, Path(recipe.run_dir))
        if asked.dry_run and dry_run is not None:
            dry_run(asked.world_size or world.world_size, recipe, terminal)
            return
        with (
            stop_signal(recipe.cluster.grace_seconds) as stop,
            joined_ranks(
                recipe.train.threads, recipe.cluster.timeout_minutes, stop, peers
            ) as ranks,
            run_lock(ranks, Path(recipe.run_dir)),
        ):
            ranks.on_first(lambda: check_places(Path(recipe.run_dir), verb))
            more = {"allow_change": asked.allow_change} if asked.allow_change else {}
            main(ranks, recipe, terminal, **more)
    except StopRequested as error:  # on all ranks together
        terminal.error(str(error))
        leave(error.exit_code)
    except CdpoError as error:
        _leave_for(error, terminal, peers)
    except OSError as error:
        if not error.errno:  # of a library, which says more by its traceback
            _leave_with_traceback(peers)
        # A full disk is no defect of ours, and has no room for more.
        kept = None if error.errno in DISK_FULL else _keep_traceback(kept_in)
        _leave_for(_of_system(error, verb, kept), terminal, peers)
    except KeyboardInterrupt:
        leave(128 + signal.SIGINT)
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            _leave_for(_out_of_memory(error), terminal, peers)
        if not _is_of_a_collective(error):
            _leave_with_traceback(peers)
        time.sleep(SECONDS_BEFORE_SPEAKING)  # a peer that failed has said why, and ends this one
        if peers.failure is not None:
            leave(peers.failure.code)
        rank = os.environ.get("RANK", "0")
        Terminal().error(
            f"rank {rank} has lost the others, or waited for them longer than "
            f"cluster.timeout_minutes={recipe.cluster.timeout_minutes:g}: {told_by(error)}"
        )
        leave(EXIT_OUTSIDE)
    except Exception:
        _leave_with_traceback(peers)


def _leave_for(error: CdpoError, terminal: Terminal, peers: Peers) -> NoReturn:
    """End with the line and the code of an error; the ranks that have not met it are told.

    Mostly rank 0 fails alike and speaks for all. Another rank gives it the time to do so before it
    leaves, at which the launcher ends the rest; and speaks itself if nobody has.
    """
    if error.of_all_ranks:
        if not terminal.enabled:
            time.sleep(LISTEN_EVERY)
        terminal.error(str(error))
        leave(error.exit_code)
    first = peers.tell(error.exit_code)
    if terminal.enabled:
        terminal.error(str(error))
        # Long enough to be heard: the store, which rank 0 keeps, ends with it.
        time.sleep(0 if os.environ.get("WORLD_SIZE", "1") == "1" else 3 * LISTEN_EVERY)
    else:
        time.sleep(SECONDS_BEFORE_SPEAKING)
        if first.rank != 0:
            Terminal().error(str(error))
    leave(first.code)


def _of_system(error: OSError, verb: str, kept: Path | None) -> OutsideError:
    """What the system refuses where no room has a better word for it: a folder that became
    read-only or full while the verb ran, a path that is too long. Or it is a defect of ours: then
    there is the traceback that was ``kept``.
    """
    place = " to ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    return OutsideError(
        f"{verb} cannot go on: {told_by(error)}{f': {place}' if place else ''}"
        + (f" (for a report of a defect: {kept})" if kept else ""),
        place or None,
        "disk-full" if error.errno in DISK_FULL else "unreadable",
    )


def _keep_traceback(folders: Sequence[Path]) -> Path | None:
    """Write the traceback of the error at hand to the first folder that takes it; where it is."""
    text = redact(traceback.format_exc()).encode()
    for path in (folder / TRACEBACK for folder in folders):
        try:
            with replacing(path, error=None) as file:
                file.write(text)
        except OSError:  # that may be what the error is about
            continue
        return path
    return None


def _out_of_memory(error: BaseException) -> OutsideError:
    return OutsideError(
        f"out of memory ({told_by(error)}): lower train.micro_batch, prepare.batch_size or "
        "compare.batch_size, or see docs/performance.md",
        kind="too-large",
    )


def _told(code: int, peers: Peers) -> int:
    """Tell the other ranks of a failure; the code that all end with."""
    first = peers.tell(code)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        time.sleep(3 * LISTEN_EVERY)
    return first.code


def _leave_with_traceback(peers: Peers) -> NoReturn:
    """A defect of ours: its traceback is what there is to say."""
    print(redact(traceback.format_exc()), end="", file=sys.stderr)
    leave(_told(EXIT_DEFECT, peers))


def _is_of_a_collective(error: Exception) -> bool:
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


def leave(code: int) -> NoReturn:
    """Exit at once: an orderly teardown would wait in collectives for peers that have failed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def joined_ranks(
    threads: int = 0,
    timeout_minutes: float = 30.0,
    stop: StopSignal | None = None,
    peers: Peers | None = None,
) -> Iterator[Ranks]:
    """Join the process group the launcher describes, or make a group of one.

    No rank waits for another longer than ``timeout_minutes``. On a CPU it computes with ``threads``
    within: the order of sums, and so the last bits of a result, follow their number.
    """
    world = launched()
    rank, world_size, local_rank = world.rank, world.world_size, world.local_rank
    on_gpu = torch.cuda.is_available()
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise OutsideError(
            f"rank {rank} wants GPU {local_rank} but this machine has {torch.cuda.device_count()}: "
            "start fewer ranks with --num_gpus",
            kind="too-large",
        )
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    threads_before = torch.get_num_threads()
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // world.local_size))
    if world_size == 1:
        for name, value in _group_of_one().items():
            os.environ.setdefault(name, value)
    timeout = timedelta(minutes=timeout_minutes)
    store = _common_store(rank, world_size, timeout)
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    host_group = dist.new_group(backend="gloo", timeout=timeout) if on_gpu else None
    stop, peers = stop or StopSignal(), peers or Peers()
    peers.join(rank, world_size, dist.distributed_c10d._get_default_store())
    stop.announce_by(peers.ask_to_stop)
    try:
        yield Ranks(rank, world_size, local_rank, device, stop, host_group)
    finally:
        torch.set_num_threads(threads_before)
        # On an error peers may be waiting in a collective; tearing down would join them.
        if sys.exc_info()[0] is None:
            peers.close()
            dist.barrier()  # the store goes with rank 0, and the others may still be listening
            dist.destroy_process_group()


def _common_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """What the ranks tell each other by: kept at MASTER_ADDR:MASTER_PORT by rank 0, or by torchrun.

    OutsideError where another program has the port. That may be another run of ours, whose store
    would take this rank for one of its own: so each rank lays claim to its number there.
    """
    place = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0"))
    keeps_it = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    stores: list[dist.Store] = []
    errors: list[dist.DistError] = []

    def meet() -> None:
        try:
            stores.append(next(dist.rendezvous("env://", timeout=timeout))[0])
        except dist.DistError as error:
            errors.append(error)

    if keeps_it:
        meet()
    else:
        # PyTorch waits without end for an answer of what is no store.
        _wait_until_somebody_listens(place, timeout)
        meeting = Thread(target=meet, daemon=True)
        meeting.start()
        meeting.join(SECONDS_TO_ANSWER)
    if keeps_it and errors and not isinstance(errors[0], dist.DistNetworkError):
        raise errors[0]  # the store is ours, and ranks have not come
    if not stores:
        raise _port_in_use(*place)
    store = stores[0]
    own = uuid4().hex
    for key, claim in (("cdpo/ranks", str(world_size)), (f"cdpo/rank/{rank}", own)):
        if store.compare_set(key, "", claim) != claim.encode():
            raise _port_in_use(*place)
    return store


def _wait_until_somebody_listens(place: tuple[str, int], timeout: timedelta) -> None:
    """Wait for the port's owner, which is given less time to answer than to appear."""
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(place, timeout=1.0):
            return
        time.sleep(0.1)
    raise OutsideError(
        f"nobody listens at {place[0]}:{place[1]}, where rank 0 should (MASTER_ADDR, MASTER_PORT), "
        f"within cluster.timeout_minutes={timeout.total_seconds() / 60:g}: is it running?",
        "MASTER_PORT",
        "timeout",
    )


def _port_in_use(address: str, port: int) -> OutsideError:
    return OutsideError(
        f"MASTER_PORT={port} of {address} is in use by another program, perhaps another run: give "
        "a free one, by MASTER_PORT in the environment, `deepspeed --master_port` or `torchrun "
        "--master-port`",
        "MASTER_PORT",
        "in-use",
    )


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
def run_lock(ranks: Ranks, folder: Path, key: str = "run_dir") -> Iterator[None]:
    """Hold a folder, the recipe's ``key``: two runs in it would destroy each other.

    RecipeError, on all ranks, if another holds it, if some rank sees another folder by that name or
    if something in it is not the file or folder that it is to be.
    """
    lock: RunLock | None = None

    def take() -> str:
        nonlocal lock
        lock = RunLock(folder, key)
        check_place(folder, key, is_folder=True)
        return lock.owner

    owner = ranks.on_first(take)
    ranks.together(lambda: refuse_other_folder(folder, owner, key))
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


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
