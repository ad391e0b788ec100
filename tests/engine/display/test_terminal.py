"""The terminal: quiet ranks, plain logs, narrow live bars."""

import io

import pytest
from cdpo.engine.display.terminal import (
    Progress,
    ProgressBar,
    Terminal,
    format_duration,
    format_field,
    plain_line,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make_terminal(**options: object) -> tuple[Terminal, io.StringIO, io.StringIO, Clock]:
    out, err, clock = io.StringIO(), io.StringIO(), Clock()
    terminal = Terminal(stdout=out, stderr=err, clock=clock, **options)  # type: ignore[arg-type]
    return terminal, out, err, clock


def test_disabled_terminal_prints_nothing():
    terminal, out, err, _ = make_terminal(enabled=False)
    terminal.header("title", [("a", "b")])
    terminal.line("x")
    terminal.warn("x")
    terminal.error("x")
    terminal.table("t", ["a"], [["1"]])
    with terminal.progress("train", 3) as progress:
        progress.advance(loss=0.5)
    assert progress.done == 1
    assert out.getvalue() == err.getvalue() == ""


def test_a_warning_is_shown_once_and_on_stderr():
    terminal, out, err, _ = make_terminal()
    for text in ("first", "first", "second", "first"):
        terminal.warn(text)
    assert err.getvalue().splitlines() == ["warning: first", "warning: second"]
    assert out.getvalue() == ""


def test_text_is_shown_as_it_is_and_never_folded():
    terminal, out, err, _ = make_terminal()
    text = "[red]a prompt[/red] :smile: " + "/long/path" * 30
    terminal.line(text)
    terminal.error(text)
    terminal.header("[b]title", [("model", text), ("x", "y")])
    assert text in out.getvalue().splitlines()
    assert err.getvalue() == f"error: {text}\n"
    assert out.getvalue().splitlines()[-3:] == ["[b]title", f"  model  {text}", "  x      y"]


def test_table_aligns_numbers_right():
    terminal, out, _, _ = make_terminal()
    rows = [["training", "0.5", "+0.031 [+0.02, +0.04]"], ["x", "10.25", "−0.1 [−0.2, +0.0]"]]
    terminal.table("Scores", ["prompts", "base", "difference"], rows)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert lines[0] == "Scores"
    assert lines[3].startswith("training") and lines[4].startswith("x ")
    assert lines[3].endswith("+0.04]") and len(lines[3]) == len(lines[4])
    assert lines[3].index("0.5") == lines[4].index("10.25") + 2


def test_plain_progress_prints_at_most_every_interval_and_at_the_end():
    terminal, out, _, clock = make_terminal(interval=30, live=False)
    with terminal.progress("train", 100, unit="steps") as progress:
        for _ in range(100):
            clock.now += 1
            progress.advance(loss=0.6931, stage="2/5")
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["30/100", "60/100", "90/100", "100/100"]
    assert lines[0] == (
        "train  30/100 steps  30%  0:00:30  ETA 0:01:10  1 steps/s  loss 0.6931  stage 2/5"
    )
    assert "ETA" not in lines[-1]


def test_plain_progress_shows_where_an_error_ended_it():
    terminal, out, _, _ = make_terminal(live=False)
    with pytest.raises(KeyError), terminal.progress("sample", 10) as progress:
        progress.advance(3)
        raise KeyError
    assert out.getvalue().startswith("sample  3/10 images  30%")


def test_eta_of_a_resumed_run_counts_new_work_only():
    clock = Clock()
    progress = Progress("train", 1000, done=900, unit="steps", clock=clock)
    assert progress.rate is None and progress.eta is None
    clock.now += 10
    progress.advance(20)
    assert progress.rate == pytest.approx(2)
    assert progress.eta == pytest.approx(40)


def test_rate_forgets_a_slow_first_step():
    clock = Clock()
    progress = Progress("train", 1000, unit="steps", clock=clock)
    clock.now += 500
    progress.advance()
    for _ in range(200):
        clock.now += 1
        progress.advance()
    assert progress.rate == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 200])
def test_live_bar_fits_any_width_and_drops_fields_from_the_right(width):
    clock = Clock()
    progress = Progress("train", 10_000, unit="steps", clock=clock)
    clock.now += 10
    progress.advance(123, loss=0.6931, stage="2/5", tiers="1-2", pairs_s=113)
    line = ProgressBar(progress).render(width).plain
    assert len(line) < width or width < 40
    shown = [name in line for name in ("ETA", "steps/s", "loss", "stage", "tiers", "pairs/s")]
    assert shown == sorted(shown, reverse=True)
    if width >= 80:
        assert "123/10000 steps" in line and "ETA" in line and "steps/s" in line
    if width == 200:
        assert all(shown)


def test_live_bar_writes_one_line_and_text_goes_above_it():
    terminal, out, _, _ = make_terminal(live=True)
    with terminal.progress("train", 2, unit="steps") as progress:
        terminal.line("above")
        with terminal.progress("samples", 1) as inner:  # sampling in the midst of training
            inner.advance()
        progress.advance(2)
    assert out.getvalue().index("above") < out.getvalue().rindex("2/2 steps")


def test_nothing_to_do():
    terminal, out, _, _ = make_terminal(live=False)
    with terminal.progress("train", 0):
        pass
    assert out.getvalue() == "train  0/0 images  0:00:00\n"
    assert len(ProgressBar(Progress("train", 0)).render(80).plain) < 80


def test_ascii_log_survives_any_prompt():
    buffer = io.BytesIO()
    out = io.TextIOWrapper(buffer, encoding="ascii")
    terminal = Terminal(stdout=out, stderr=io.StringIO())
    terminal.line("café 猫")
    terminal.table("t", ["a", "b"], [["é", "1"]])
    out.flush()
    assert buffer.getvalue().startswith(b"caf? ?")


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("loss", 0.693147, "loss 0.6931"),
        ("loss", float("nan"), "loss nan"),
        ("lr", 5e-5, "lr 5.0e-05"),
        ("grad_norm", 123.456, "grad norm 123.5"),
        ("pairs_s", 113, "113 pairs/s"),
        ("pairs_s", 113.2, "113.2 pairs/s"),
        ("reward", None, "reward –"),
        ("margin", 0.0, "margin 0.0000"),
    ],
)
def test_fields(name, value, shown):
    assert format_field(name, value) == shown


def test_durations():
    assert format_duration(80.4) == "0:01:20"
    assert format_duration(100 * 3600) == "100:00:00"


def test_slow_rates_are_seconds_a_unit():
    clock = Clock()
    progress = Progress("train", 10, unit="steps", clock=clock)
    clock.now += 10
    progress.advance(4)
    assert "2.5 s/step" in plain_line(progress)
