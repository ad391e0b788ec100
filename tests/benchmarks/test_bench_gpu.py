"""`make gpu`: its table, what is run again and what is not, and the tables made of its results."""

import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import bench_gpu
import bench_kernels
import bench_step
import pytest
import torch
from bench_gpu import DONE, FAILED, NO_GPU, TIME_IS_UP, choose, is_done, run, run_all
from gpu import report
from gpu.parts import MODELS, PARTS, Part
from step_bench.models import REAL
from step_bench.ours import Knobs

ROOT = Path(__file__).parents[2]


def part(name: str, code: str = "open('{out}/%s.txt', 'a').write('x')", minutes: int = 1) -> Part:
    """One that writes a letter more each time it runs."""
    command = ("python", "-c", code % name if "%s" in code else code)
    return Part(name, command, command, (f"{name}.txt",), minutes)


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.setattr(bench_gpu, "LINKS", tmp_path / "links")
    monkeypatch.setattr(bench_gpu, "conditions", lambda: {"commit": "abc"})

    def go(*parts: Part, again: bool = False, minutes: float = 9) -> int:
        return run_all(list(parts), tmp_path, rehearse=True, again=again, minutes=minutes)

    return go


def test_parts_have_names_of_their_own_and_take_less_than_ten_minutes() -> None:
    assert len({part.name for part in PARTS}) == len(PARTS)
    assert all(part.minutes < 10 and part.writes for part in PARTS)
    files = [name for part in PARTS for name in part.writes]
    assert len(set(files)) == len(files)
    assert set(MODELS.values()) == set(REAL)
    assert [part.name for part in choose(["profile", "memcheck"])] == ["memcheck", "profile"]


def parsed(part: Part, command: tuple[str, ...]) -> Namespace:
    script = {"bench_step.py": bench_step, "bench_kernels.py": bench_kernels}[Path(command[1]).name]
    return script.parse(list(command[2:]))


@pytest.mark.parametrize("part", [part for part in PARTS if "benchmarks/bench_" in part.command[1]],
                         ids=lambda part: part.name)  # fmt: skip
def test_benchmarks_take_what_the_table_gives_them(
    part: Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_kernels, "cases", lambda *_: [part])  # shapes of UNets take seconds
    assert parsed(part, part.rehearsal).tiny
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = parsed(part, part.command)
    assert not options.tiny and f"{options.out}" == f"{{out}}/{part.writes[0]}"
    if "--knob" in part.command:
        model = REAL[options.models[0]]
        cuda = Knobs.for_device(torch.device("cuda"), model)
        changed = bench_step.variants(model, cuda, on_gpu=True, compiles=options.compile)
        assert any(options.knob in name for name in changed)


def test_what_is_done_is_not_repeated(go, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    one, two = part("one"), part("two")
    assert go(one) == DONE and go(one, two) == DONE
    written = [(tmp_path / f"{name}.txt").read_text() for name in ("one", "two")]
    assert written == ["x", "x"] and "one: done before" in capsys.readouterr().out
    assert json.loads((tmp_path / "one.done.json").read_text())["commit"] == "abc"
    (tmp_path / "one.txt").unlink()  # what it wrote is gone
    assert not is_done(one, tmp_path, rehearse=True)
    assert go(one) == DONE and is_done(one, tmp_path, rehearse=True)
    changed = part("one", "open('{out}/one.txt', 'w').write('new')")
    assert not is_done(changed, tmp_path, rehearse=True)
    (tmp_path / "one.txt").write_text("old")
    assert go(one, again=True) == DONE and (tmp_path / "one.txt").read_text() == "x"


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("raise SystemExit(9)", "ended with 9"),
        ("pass", "did not write bad.txt"),
        ("import time; time.sleep(60)", "more than 1 s"),
    ],
)
def test_a_part_that_fails_is_told_and_the_others_run(
    go,  # type: ignore[no-untyped-def]
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys,  # type: ignore[no-untyped-def]
    code: str,
    problem: str,
) -> None:
    monkeypatch.setattr(run, "__defaults__", (1,))
    bad, good = part("bad", code), part("good")
    assert go(bad, good) == FAILED and is_done(good, tmp_path, rehearse=True)
    assert problem in capsys.readouterr().out and not is_done(bad, tmp_path, rehearse=True)


def test_no_part_begins_that_would_end_too_late(go, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert go(part("one"), part("two", minutes=9), minutes=5) == TIME_IS_UP
    assert (tmp_path / "one.txt").exists() and not (tmp_path / "two.txt").exists()
    # The first that is not done is begun in any case, or the same command would never get on.
    assert go(part("one"), part("two", minutes=9), part("three"), minutes=5) == DONE
    missing = Part("none", ("no-such-program",), ("no-such-program",), ("none.txt",), 1)
    assert go(missing) == FAILED


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line_and_a_code(capsys) -> None:  # type: ignore[no-untyped-def]
    assert bench_gpu.main([]) == NO_GPU
    assert capsys.readouterr().out.count("\n") == 1
    assert bench_gpu.main(["--list"]) == DONE
    assert capsys.readouterr().out.split() == [part.name for part in PARTS]


def test_the_tables_of_the_docs_are_blank_where_nothing_was_measured(tmp_path: Path) -> None:
    assert not re.search("[0-9]", "".join(re.findall(r"\| – .*", report.tables(None))))
    found = sorted((ROOT / "benchmarks" / "results").glob("gpu_*"))
    docs = tmp_path / "performance.md"
    docs.write_text(report.DOCS.read_text())
    report.write(found[-1] if found else None, docs)
    assert docs.read_text() == report.DOCS.read_text()


def test_the_tables_say_what_was_measured(tmp_path: Path) -> None:
    spread = {"median": 1.25, "p20": 1.0, "p80": 1.5}
    about = {"device": {"name": "NVIDIA X", "driver": "1.2"}, "versions": {"torch": "2.11"},
             "commit": "abc"}  # fmt: skip
    ours = {"pairs_per_s": {"median": 61.04}, "share_of_peak": 0.4, "peak_gib": 33.33}
    other = ours | {"pairs_per_s": {"median": 40.0}}
    model = {"pairs": 16, "steps": {"ours": ours, "straightforward": other}}
    knobs = {"latents encoded live": {"time": spread}, "text encoded live": {"time": None,
             "failed": "out of memory"}}  # fmt: skip
    bases = {"base in nf4": {"time": spread, "peak_gib": 20.04}, "base in fp8": {"time": None,
             "failed": "needs torchao"}}  # fmt: skip
    row = {"kernel": "geglu", "model": "SD1.5@512", "phase": "both",
           "speedup_over": {"eager": spread},
           "implementations": {"ours": {"ms": {"median": 0.5}, "share_of_copy": 0.6}}}  # fmt: skip
    for name, found in {
        "step_sd15": {"benchmark": "step", "models": [model | {"knobs": {}}]},
        "step_sd15_live": {"benchmark": "step", "models": [model | {"knobs": knobs}]},
        "step_sd15_rounding": {"benchmark": "step", "models": [model | {"steps": {"ours": other}}]},
        "step_flux_quantised": {"benchmark": "step", "models": [model | {"knobs": bases}]},
        "kernels_sd15_64": {
            "benchmark": "kernels",
            "summary": [
                row | {"pairs": 1},
                row | {"pairs": 64},
                row | {"phase": "forward", "pairs": 64},
            ],
        },
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(about | found))
    text = report.tables(tmp_path)
    assert text.startswith("NVIDIA X, driver 1.2, torch 2.11; commit abc.\n")
    assert (
        "| SD1.5@512 | 16 | 61.0 | 40% | 33.3 | 40.0 | 1.25, out of memory | – | – | – | 1.53 |\n"
        in text
    )
    assert "| whole | 33.3 | 1.00 |\n| nf4 | 20.0 | 1.25 |\n| int8 | – | – |\n" in text
    assert "| fp8 | – | needs torchao |\n" in text
    assert "| geglu | SD1.5@512 | 64 | 0.500 | 60% | 1.25 | – |\n" in text
    assert text.count("geglu") == 1
    assert f"| SDXL@1024 |{10 * ' – |'}\n" in text


@pytest.mark.long
def test_what_is_brought_is_all_that_the_parts_load() -> None:
    paths = [*(str(ROOT / name) for name in ("benchmarks", "tests")), *sys.path]
    plugins = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "pytest_timeout"}
    ended = subprocess.run(
        [sys.executable, "tests/workers/as_on_a_gpu.py"],
        cwd=ROOT,
        env={**os.environ, **plugins, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name", ["kernel_tests", "memcheck", "kernels_sd15_8", "step_sd15_live", "profile"]
)
def test_a_rehearsal_of_each_kind_of_part(tmp_path: Path, name: str) -> None:
    chosen = next(part for part in PARTS if part.name == name)
    assert run_all([chosen], tmp_path, rehearse=True, again=False, minutes=9) == DONE
    assert is_done(chosen, tmp_path, rehearse=True)
