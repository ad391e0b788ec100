"""The history of the step benchmark, with made-up rows."""

import json

import pytest
from step_bench import history


def spread(median: float, half: float = 0.0) -> dict:
    return {"p20": median - half, "median": median, "p80": median + half}


def made_up_row(device: str = "GPU A", date: str = "2026-01-01", **figures: dict) -> dict:
    """Of one model, M; `figures` over some that do nothing."""
    steady = {"pairs": 8, "precision": "bf16", "pairs_per_s": spread(80, 2), "speedup": spread(2)}
    return {
        "date": f"{date} 00:00 UTC",
        "commit": "abcdef",
        "device": {"type": "cuda", "name": device, "driver": "1"},
        "versions": {"torch": "2"},
        "tiny": False,
        "figures": {"M": steady | figures},
    }


@pytest.mark.parametrize(
    ("now", "falls"),
    [
        (spread(80, 2), False),
        (spread(90, 2), False),
        (spread(76.1, 1), False),  # less than the 4 from the last row's 78 to its 82
        (spread(75.9, 1), True),
        (spread(75.9, 3), False),  # its own spread is 6 now
        (spread(70, 3), True),
    ],
)
def test_a_fall_is_more_than_the_spread(now, falls):
    found = history.fallen(made_up_row(), made_up_row(pairs_per_s=now))
    assert found == ([f"M: pairs/s fell from 80 to {now['median']:.3g}"] if falls else [])


def test_every_figure_is_looked_at():
    found = history.fallen(made_up_row(), made_up_row(pairs_per_s=spread(60), speedup=spread(1.9)))
    assert [line.partition(" fell")[0] for line in found] == [
        "M: pairs/s",
        "M: speedup over the straightforward step",
    ]


def test_what_is_gone_is_told():
    newest = made_up_row()
    newest["figures"] = {}
    assert history.fallen(made_up_row(), newest) == [
        "M: pairs/s is missing",
        "M: speedup over the straightforward step is missing",
    ]


def test_another_step_is_not_held_to_the_throughput_of_the_last():
    found = history.fallen(made_up_row(), made_up_row(pairs=4, pairs_per_s=spread(40)))
    assert found == ["M: pairs/s not compared, the step is another one"]


def test_a_row_is_held_to_the_last_one_of_its_device():
    slow = {"pairs_per_s": spread(40)}
    rows = [made_up_row("GPU A", "2026-01-01"), made_up_row("GPU B", "2026-01-02", **slow)]
    assert history.verdict(rows) == ["first row of GPU B: nothing to compare with"]
    rows.append(made_up_row("GPU A", "2026-01-03", **slow))
    assert history.verdict(rows) == ["M: pairs/s fell from 80 to 40 since 2026-01-01 (abcdef)"]
    rows.append(made_up_row("GPU A", "2026-01-04", **slow))
    assert history.verdict(rows) == ["no figure of GPU A fell since 2026-01-03 (abcdef)"]
    rows.append(made_up_row("GPU A", "2026-01-05", **slow) | {"tiny": True})
    assert history.verdict(rows) == ["first row of GPU A: nothing to compare with"]


def made_up_result(on_gpu: bool) -> dict:
    ours = {"units_per_pair": 6.2, "peak_gib": 40.0 if on_gpu else None, "calls": {}}
    if on_gpu:
        ours |= {"pairs_per_s": spread(80), "share_of_peak": None, "ms": spread(100)}
    model = {"model": "M", "pairs": 8, "precision": "bf16", "speedup": spread(1.5)}
    device = {"type": "cuda" if on_gpu else "cpu", "name": "D", "driver": "1", "memory_gib": 80}
    return {
        "date": "2026-01-01 00:00 UTC",
        "commit": "abcdef",
        "device": device,
        "versions": {"torch": "2"},
        "tiny": not on_gpu,
        "models": [model | {"steps": {"ours": ours}, "knobs": {}}],
    }


@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_run_is_appended_and_drawn(tmp_path, on_gpu):
    path = tmp_path / "results" / "history.jsonl"
    for _ in range(2):
        said = history.record(made_up_result(on_gpu), path)
    assert said[0] == "no figure of D fell since 2026-01-01 (abcdef)"
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    first, second = map(json.loads, path.read_text().splitlines())
    assert first == second
    assert first["device"] == {"type": first["device"]["type"], "name": "D", "driver": "1"}
    figures = {"pairs", "precision", "speedup", "units_per_pair"}
    assert set(first["figures"]["M"]) == figures | (
        {"pairs_per_s", "peak_gib"} if on_gpu else set()
    )


def test_a_broken_history_is_refused_before_it_is_written_to(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text(json.dumps(made_up_row()) + "\n{")
    before = path.read_text()
    with pytest.raises(ValueError, match="line 2 is no JSON"):
        history.record(made_up_result(True), path)
    assert path.read_text() == before


def test_an_empty_history_says_how_to_begin_one(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        history.main([str(tmp_path / "none.jsonl")])
    assert "bench_step.py --history" in capsys.readouterr().err
