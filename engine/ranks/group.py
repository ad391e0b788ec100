"""This process among its peers: what ranks do together, and how they agree that it has failed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..basics.errors import CdpoError, StopRequested
from .launcher import local_size
from .signals import STOPPING, StopSignal

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """This process among its peers. Collectives take host objects and do nothing for one rank."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    stop: StopSignal = field(default_factory=StopSignal)
    """Whether this rank has been asked to stop."""
    host_group: dist.ProcessGroup | None = None
    """The ranks by way of host memory, where the default group's is the device's: what they tell
    each other there waits for no device, and no device for them."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def local_size(self) -> int:
        """Ranks on this machine."""
        return local_size(self.world_size)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier(self.host_group)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, self.host_group)
        return values

    def any_is(self, *facts: bool) -> list[bool]:
        """Each fact, whether it is one on any rank: cheaper than :meth:`gather`, for every step."""
        if self.world_size == 1:
            return list(facts)
        found = torch.tensor(facts, dtype=torch.int32)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.host_group)
        return [bool(fact) for fact in found.tolist()]

    def from_first(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]

    def agree(self, error: Exception | None) -> None:
        """Raise on every rank if any rank failed, so that none waits for a peer that has left."""
        for peer_error in self.gather(error):
            if peer_error is not None:
                raise _of_all(peer_error)

    def together(
        self, work: Callable[[], Item], errors: tuple[type[Exception], ...] = (CdpoError,)
    ) -> Item:
        """Run ``work`` on every rank; if it fails with one of ``errors`` on any, all raise that.

        It is not to wait for other ranks itself: one that fails would leave them there.
        """
        failure: Exception | None = None
        try:
            result = work()
        except errors as exc:
            failure = exc
        self.agree(failure)
        return result

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
            raise _of_all(error)
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
                f"stopped on request ({reason}); the same command goes on from there",
                kind="stopped",
            )

    def divided(self, items: Sequence[Item], work: Callable[[Item], Result]) -> list[Result]:
        """What ``work`` makes of every item, in order, on every rank, each having done a share.

        Raises StopRequested on all if any was asked to stop.
        """
        own = [work(item) for item in self.until_stopped(self.share(items))]
        self.meet()
        parts = self.gather(own)
        return [parts[at % self.world_size][at // self.world_size] for at in range(len(items))]

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


def _of_all(error: Exception) -> Exception:
    """An error that every rank raises now, marked as such: nobody need be told of it."""
    if isinstance(error, CdpoError):
        error.of_all_ranks = True
    return error
