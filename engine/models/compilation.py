"""What torch.compile is at, told while it is: the first step waits for minutes, in silence else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch._dynamo.callback import CallbackArgs, CallbackTrigger, callback_handler

INTERVAL = 10.0  # least seconds between two lines, as between lines of progress


@contextmanager
def compilation_told(
    pieces: int, tell: Callable[[str], object], clock: Callable[[], float] = time.monotonic
) -> Iterator[None]:
    """Within, ``tell`` gets a line when compilation starts, and at most one each ten seconds.

    Args:
        pieces: graphs that are sure to be made, forward and backward passes counted as one; 0 where
            nothing is compiled, of which nothing is told. Autograd asks for some more: the first
            block of a policy, whose input needs no gradient, is one.
        tell: prints a line.
        clock: seconds.
    """
    made, spent, began, told = 0, 0.0, 0.0, clock()

    def start(args: CallbackArgs) -> None:
        nonlocal began
        began = clock()
        if not (made or spent):
            tell(f"compiles {pieces} pieces or some more before the first step is done")

    def end(args: CallbackArgs) -> None:
        nonlocal made, spent, told
        made += args.callback_trigger == CallbackTrigger.DYNAMO
        spent += clock() - began
        if clock() - told >= INTERVAL:
            told = clock()
            left = f", {pieces - made} left" if made < pieces else ""
            tell(f"compiled {made} pieces in {spent:.0f} s{left}")

    if not pieces:
        yield
        return
    callback_handler.register_start_callback(start)
    callback_handler.register_end_callback(end)
    try:
        yield
    finally:
        callback_handler.remove_start_callback(start)
        callback_handler.remove_end_callback(end)
