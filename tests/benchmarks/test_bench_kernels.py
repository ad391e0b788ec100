"""The kernel benchmark: it compares like with like, counts right, and says what it measured."""

import io
import json

import bench_kernels
import pytest
import torch
from cdpo.kernels.dispatch import INTERPRETED
from kernel_bench.cases import cases
from kernel_bench.plots import draw_all
from kernel_bench.results import add_bandwidth, drop_absolutes, speedups, summarise, table
from kernel_bench.unet_layers import GegluCall, GroupNormCall, layer_calls
from measuring.agreement import Disagreement, as_list, compare, compare_distributions
from measuring.device_costs import count_operators
from measuring.timing import Spread, Times, take_turns
from rich.console import Console
from torch._dynamo.exc import TorchDynamoException

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the benchmark runs compiled code")

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
TINY = cases(["tiny@64"], [3], "")


# ------------------------------------------------------------------------------------ agreement


@pytest.mark.parametrize("case", TINY, ids=lambda case: f"{case.kernel} {case.shape}")
def test_ours_and_eager_compute_the_same(case):
    torch.manual_seed(0)
    inputs = case.make_inputs(DEVICE)
    assert all(x.any() for x in inputs.values())
    case.agreement(case.ours, case.eager, inputs)
    for other in case.others.values():
        case.agreement(other, case.eager, inputs)


def test_another_computation_is_noticed():
    loss, *_ = (case for case in TINY if case.kernel == "paired_dpo_loss")
    inputs = loss.make_inputs(DEVICE)

    def steeper(policy, **others):
        return loss.ours(policy, **others) + (policy - policy.detach()).sum()

    with pytest.raises(Disagreement, match="result 0 is off"):
        compare(lambda **x: 1.001 * loss.ours(**x), loss.eager, inputs)
    with pytest.raises(Disagreement, match="result 1 is off"):  # the same value, another gradient
        compare(steeper, loss.eager, inputs)


def test_another_distribution_is_noticed():
    (noise,) = cases(["tiny@64"], [64], "philox_normal")
    inputs = noise.make_inputs(DEVICE)
    for wrong in (lambda x: 2 * x, lambda x: x + 1, lambda x: 1.73 * torch.rand_like(x) * x.sign()):
        with pytest.raises(Disagreement, match="moment"):
            compare_distributions(
                lambda wrong=wrong, **x: wrong(noise.ours(**x)), noise.eager, inputs
            )


# ------------------------------------------------------------------------------ shapes and bytes


def test_bytes_of_the_loss_by_hand():
    """Two pairs of SD1.5: 4 bf16 samples of 4·64·64 are 131,072 bytes, 2 float32 ones as many."""
    loss, *_ = cases(["SD1.5@512"], [2], "paired_dpo_loss")
    assert loss.shape == "4x4x64x64"
    # policy, reference, target; loss, 2 logits, 2 shares of losers, 4 errors of each network
    assert loss.bytes_forward == 3 * 131_072 + 13 * 4
    # policy, target, gradient; upstream gradient, 2 logits, 2 shares of losers
    assert loss.bytes_backward == 3 * 131_072 + 5 * 4


@pytest.mark.parametrize("case", TINY, ids=lambda case: f"{case.kernel} {case.shape}")
def test_bytes_are_those_of_the_tensors(case):
    """Inputs and outputs, but for a few numbers a pair and the tables of α and σ."""
    inputs = case.make_inputs(DEVICE)
    tensors = [*inputs.values(), *as_list(case.ours(**inputs))]
    moved = sum(x.nbytes for x in tensors if x.shape != (1000,))
    assert abs(case.bytes_forward - moved) <= 64 * case.pairs


@pytest.mark.parametrize(
    ("model", "num_norms", "num_geglus"), [("SD1.5@512", 61, 16), ("SDXL@1024", 46, 70)]
)
def test_layers_of_the_published_networks(model, num_norms, num_geglus):
    calls = layer_calls(model)
    norms = {call: count for call, count in calls.items() if isinstance(call, GroupNormCall)}
    geglus = {call: count for call, count in calls.items() if isinstance(call, GegluCall)}
    assert sum(norms.values()) == num_norms
    assert sum(geglus.values()) == num_geglus
    # The norms of attention do not activate; those of residual blocks and of the output do.
    transformers = {"SD1.5@512": 16, "SDXL@1024": 11}[model]
    assert sum(count for call, count in norms.items() if not call.silu) == transformers


# -------------------------------------------------------------------------------------- timing


class CountingClock:
    """A clock that shows how often it was asked: 1, 2, 3… ms."""

    def __init__(self) -> None:
        self.order: list[str] = []

    def measure(self, run, host_ms):
        self.order.append(run())
        return float(len(self.order)), 0.0


def test_alternatives_take_turns_in_reversed_order():
    clock = CountingClock()
    times = take_turns({"a": lambda: lambda: "a", "b": lambda: lambda: "b"}, clock, budget_s=0)
    assert "".join(clock.order) == "ab" * 3 + "ab" + "ba" + "ab" + "ba" + "ab"  # 3 to warm up
    assert times["a"].device == [7, 10, 11, 14, 15]
    assert times["b"].device == [8, 9, 12, 13, 16]


def test_spread_and_speedups_by_hand():
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == pytest.approx((1.8, 3.0, 4.2))
    times = {"ours": Times([1.0, 2.0, 4.0], []), "eager": Times([3.0, 4.0, 4.0], [])}
    assert speedups(times)["eager"]["median"] == 2.0  # of 3, 2 and 1: not 4 / 2 of the medians


def test_operators_are_counted_without_views():
    x = torch.randn(4, 4)
    assert count_operators(lambda: lambda: (x.T.unsqueeze(0) + 1).relu().sum()) == 3


# ------------------------------------------------------------------------------------- results


def made_up_row(shape: str, count: int, ours_ms: float, eager_ms: float) -> dict:
    parts = {
        name: {
            "ms": {"p20": ms, "median": ms, "p80": ms},
            "host_ms": 0.1,
            "launches": launches,
            "operators": None,
            "peak_mib": ms,
        }
        for name, ms, launches in (("ours", ours_ms, 2), ("eager", eager_ms, 5))
    }
    return {
        "kernel": "norm",
        "model": "M",
        "pairs": 1,
        "shape": shape,
        "count": count,
        "phase": "forward",
        "bytes": 1_000_000,
        "error": None,
        "implementations": parts,
        "speedup_over": {"eager": dict.fromkeys(Spread._fields, eager_ms / ours_ms)},
    }


def test_summary_adds_shapes_with_their_counts():
    """Three times 1 ms against 2 ms, once 5 ms against 4 ms: 10 ms against 8 ms."""
    (summary,) = summarise([made_up_row("a", 3, 1.0, 2.0), made_up_row("b", 1, 5.0, 4.0)])
    assert summary["speedup_over"]["eager"]["median"] == pytest.approx(10 / 8)
    assert summary["implementations"]["ours"]["ms"]["median"] == 8
    assert summary["implementations"]["eager"]["launches"] == 4 * 5
    assert summary["implementations"]["ours"]["peak_mib"] == 5
    assert summarise([made_up_row("a", 3, 1.0, 2.0)], [("norm", "M", 1)]) == []
    add_bandwidth([summary], copy_gb_per_s=2.0)  # 4 MB in 8 ms are 0.5 GB/s
    assert summary["implementations"]["ours"]["share_of_copy"] == pytest.approx(0.25)


def test_table_and_plots_of_a_gpu_show_times_and_bandwidth(tmp_path):
    rows = [made_up_row("a", 1, 1.0, 2.0)]
    summary = summarise(rows)
    add_bandwidth(summary, copy_gb_per_s=2.0)
    device = {"type": "cuda", "name": "made up"}
    result = {"device": device, "date": "2026-01-01", "ours": "Triton", "summary": summary}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(result))
    shown = console.export_text()
    assert all(text in shown for text in ("2.00 [2.00, 2.00]", "1.000", "50%", "2 / 5"))
    (plot,) = draw_all(result, tmp_path)
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_rows_of_a_cpu_hold_no_times():
    rows = [made_up_row("a", 1, 1.0, 2.0)]
    drop_absolutes(rows)
    assert rows[0]["speedup_over"]["eager"]["median"] == 2
    kept = set(rows[0]["implementations"]["ours"])
    assert kept == {"launches", "operators", "peak_mib"}


# ---------------------------------------------------------------------------------- the script


@pytest.mark.skipif(GPU, reason="checks what a run without a GPU says")
def test_tiny_run(tmp_path, capsys):
    out = tmp_path / "kernels.json"
    arguments = ["--tiny", "--batches", "2", "4", "--out", str(out), "--kernels", "loss cached"]
    assert bench_kernels.main(arguments) == 0
    result = json.loads(out.read_text())
    assert result["note"].startswith("ratios only")
    assert "not Triton" in result["ours"]
    assert {"torch", "triton", "cuda", "python", "diffusers"} == set(result["versions"])
    assert result["commit"] and result["date"] and result["tiny"] is True
    assert result["device"]["type"] == "cpu"
    phases = [(row["pairs"], row["phase"]) for row in result["rows"]]
    assert phases == [(n, phase) for n in (2, 4) for phase in ("forward", "backward", "both")]
    for row in result["rows"] + result["summary"]:
        assert row["speedup_over"]["eager"]["median"] > 0
        spread = row["speedup_over"]["eager"]
        assert spread["p20"] <= spread["median"] <= spread["p80"]
        assert row["bytes"] > 0
        assert all("ms" not in part for part in row["implementations"].values())
    assert 0 < result["rows"][0]["error"]["ours"] < torch.finfo(torch.bfloat16).eps
    assert "copy_gb_per_s" not in result
    plots = list((tmp_path / "kernels").glob("*.png"))
    assert [plot.name for plot in plots] == ["paired_dpo_loss_cached.png"]
    assert plots[0].stat().st_size > 10_000
    assert "eager operators" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_tiny_run_on_a_gpu(tmp_path):
    out = tmp_path / "kernels.json"
    assert bench_kernels.main(["--tiny", "--out", str(out), "--kernels", "paired_dpo_loss"]) == 0
    result = json.loads(out.read_text())
    assert result["copy_gb_per_s"] > 10 * result["empty_ms"]
    for row in result["rows"]:
        for part in row["implementations"].values():
            assert part["ms"]["median"] > 0
            assert part["share_of_copy"] > 0
            assert part["peak_mib"] > 0
        launches = row["implementations"]["ours"]["launches"]
        assert launches == (2 if row["phase"] == "both" else 1)


def test_what_does_not_fit_is_left_out_of_the_summary(monkeypatch, tmp_path):
    def refuse(*_):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(bench_kernels, "measure", refuse)
    options = bench_kernels.parse(["--tiny", "--kernels", "geglu", "--batches", "2"])
    result = bench_kernels.run(options, DEVICE, Console(file=io.StringIO()))
    assert result["summary"] == result["rows"] == []
    assert result["out_of_memory"] == ["geglu, tiny@64, 4x64x256"]


def test_without_a_compiler_the_rest_is_timed(monkeypatch):
    def refuse(*_, **__):
        raise TorchDynamoException("no C++ compiler")

    console = Console(record=True, file=io.StringIO())
    monkeypatch.setattr(torch, "compile", lambda *_, **__: refuse)
    case = TINY[0]
    assert bench_kernels.compile_eager(case, case.make_inputs(DEVICE), console) == {}
    assert "not compiled: paired_dpo_loss" in console.export_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tiny", "--kernels", "nonsense"], "no kernel's name contains this"),
        (["--tiny", "--batches", "0"], "at least one pair"),
        (["--models", "SD9"], "invalid choice"),
        pytest.param([], "give --tiny", marks=pytest.mark.skipif(GPU, reason="has a GPU")),
    ],
)
def test_bad_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench_kernels.parse(arguments)
    assert message in capsys.readouterr().err
