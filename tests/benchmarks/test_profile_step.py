"""benchmarks/profile_step.py on the tiny world: the trace, the tables, the command it prints."""

import gzip
import json
import re
import shlex
from pathlib import Path

import pytest
from cdpo.engine.basics.phases import PHASES
from launching import ROOT, World
from step_bench.trace import KernelTotals, PhaseTotals, StepTrace, read_trace

SCRIPT = ROOT / "benchmarks" / "profile_step.py"


def rows_under(title: str, output: str) -> dict[str, tuple[float, float, float]]:
    """Calls, milliseconds and percent of each row of a table, by name."""
    lines = output.split(title, 1)[1].splitlines()[3:]
    found = {}
    for line in lines:
        row = re.match(r"(\S+)\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)%\s*$", line)
        if row is None:
            break
        found[row[1]] = tuple(map(float, row.groups()[1:]))
    return found


def test_two_steps_of_the_real_trainer(world: World, tmp_path: Path) -> None:
    before = sorted((world.folder / "run").iterdir())
    options = ["--steps", "2", "--out", str(tmp_path), "seed=4"]
    text = world.server.run(SCRIPT, world.recipe, options, env={"COLUMNS": "120"}).succeeded().text
    assert sorted((world.folder / "run").iterdir()) == before  # it trained elsewhere

    with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    names = [e["name"] for e in events if e.get("cat") == "user_annotation"]
    present = [name for name in PHASES if name not in ("teacher", "solver")]  # those of LCMs
    assert set(present) <= set(names)
    # 8 pairs in micro-batches of 4: two of each phase a step, but one read
    assert (names.count("data"), names.count("policy"), names.count("backward")) == (2, 4, 4)

    trace = read_trace(tmp_path / "trace.json.gz")
    times = [trace.phases[name].host_ms for name in present]
    assert trace.num_steps == 2
    assert min(times) > 0
    assert 0.5 * trace.host_ms < sum(times) <= trace.host_ms

    phases = rows_under("Phases of a step", text)
    assert list(phases) == [*PHASES, "other", "step"]
    calls, step_ms, share = phases.pop("step")
    assert (calls, share) == (1, 100)
    assert sum(ms for _, ms, _ in phases.values()) == pytest.approx(step_ms, abs=0.01 * len(phases))
    operators = rows_under("Operators", text)
    assert any(name.startswith("aten::") for name in operators)
    assert sum(ms for _, ms, _ in operators.values()) <= step_ms
    assert "no GPU here" in text
    command = re.search(r"ncu --set full .*", text)
    assert command is not None
    words = shlex.split(command[0])
    # three steps of warm-up with two launches each
    assert words[words.index("--launch-skip") + 1] == "6"
    assert words[words.index("python") + 1 :] == [
        *("benchmarks/profile_step.py", "--recipe", str(world.recipe), "--steps", "2"),
        *("seed=4", "--no-profiler"),
    ]


def test_without_shards_it_says_what_to_run_first(world: World, tmp_path: Path) -> None:
    outcome = world.server.run(SCRIPT, world.recipe, [f"data.path={tmp_path / 'none'}"])
    outcome.refused(3, "run prepare first")


def test_the_ncu_command_is_for_the_costliest_kernel_unless_one_is_named(tmp_path: Path) -> None:
    from profile_step import ncu_command

    kernels = {"gemm": KernelTotals(40, 9.0), "backward_kernel": KernelTotals(4, 1.0)}
    trace = StepTrace(2, 20.0, 10.0, 0, {"loss": PhaseTotals(calls=4)}, kernels)
    for given, name, skip in ((None, "gemm", 60), ("backward_kernel", "backward_kernel", 6)):
        command = ncu_command(trace, tmp_path, given, ["--recipe", "a recipe.yaml"])
        words = shlex.split(command)
        assert words[:5] == ["ncu", "--set", "full", "--kernel-name", f"regex:^{name}$"]
        assert words[5:9] == ["--launch-skip", str(skip), "--launch-count", "1"]
        assert words[-4:] == [
            "benchmarks/profile_step.py",
            "--recipe",
            "a recipe.yaml",
            "--no-profiler",
        ]
