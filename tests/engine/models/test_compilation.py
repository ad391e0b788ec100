"""What is told of a compilation, by a clock of the test's own."""

from __future__ import annotations

import pytest
from cdpo.engine.models.compilation import compilation_told
from torch._dynamo.callback import CallbackTrigger, callback_handler


@pytest.mark.parametrize("pieces", [0, 3])
def test_a_line_at_the_start_one_each_ten_seconds_and_one_for_each_late_piece(pieces) -> None:
    lines: list[str] = []
    now = 0.0

    def compile_for(seconds: float, trigger: CallbackTrigger = CallbackTrigger.DYNAMO) -> None:
        nonlocal now
        with callback_handler.install_callbacks(trigger, "0/0"):
            now += seconds

    with compilation_told(pieces, lines.append, clock=lambda: now):
        compile_for(6)
        compile_for(7)
        compile_for(4, CallbackTrigger.LAZY_BACKWARD)
        compile_for(8)
        now += 100  # of training
        compile_for(2)
    compile_for(50)
    told = [
        "compiles 3 pieces or some more before the first step is done",
        "compiled 2 pieces in 13 s, 1 left",
        "compiled 3 pieces in 25 s",
        "compiled 4 pieces in 27 s",
    ]
    assert lines == (told if pieces else [])
