"""The step benchmark: two steps of one loss, which make the calls they are said to, and counts."""

import io
import json
import re
from dataclasses import fields, replace
from functools import partial
from unittest.mock import Mock

import bench_step
import pytest
import torch
from cdpo.engine.basics import keyed
from cdpo.engine.training.cuda_graph import CapturedLoss
from cdpo.kernels.dispatch import INTERPRETED
from rich.console import Console
from step_bench import ours
from step_bench.counts import count_flops, counted_calls
from step_bench.models import REAL, TINY
from step_bench.ours import Knobs, NotCaptured, OurStep
from step_bench.plot import bars_of, draw
from step_bench.results import calls_text, knobs_table, peak_tflops, step_row, steps_table
from step_bench.setup import make_pairs, trainable
from step_bench.straightforward import Randomness, StraightforwardStep, straightforward
from taped import Tape

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the benchmark runs compiled code")

CPU = torch.device("cpu")
GPU = torch.cuda.is_available()
PAIRS = 2
# Shards hold half precision; the straightforward step never rounds its latents to it.
EXACT = replace(Knobs.for_device(CPU, TINY["SD1.5@512"]), latents_dtype=torch.float32)
FLOW = [name for name, model in TINY.items() if model.spec.is_flow]
# The designs, in images or prompts a call, for B = 2 pairs; and what PERFORMANCE says they cost.
OURS = {
    "SD1.5@512": {"reference": [4], "policy": [4]},
    "SDXL@1024": {"reference": [4], "policy": [4]},
    "LCM@768": {"reference": [4, 4], "teacher": [8], "policy": [4]},
    "LCM-image@768": {"reference": [4], "policy": [4]},
    **{name: {"reference": [4], "policy": [4]} for name in FLOW},
}
STRAIGHTFORWARD = {
    "SD1.5@512": {"vae": [4], "text 1": [2], "policy": [4], "reference": [4]},
    "SDXL@1024": {"vae": [4], "text 1": [2], "text 2": [2], "policy": [4], "reference": [4]},
    "LCM@768": {
        "text 1": [2],
        "vae": [4],
        "teacher": [2] * 4,
        "reference": [2] * 6,
        "policy": [2] * 2,
    },
    "LCM-image@768": {"text 1": [2], "vae": [4], "reference": [2] * 2, "policy": [2] * 2},
    # The reference is the policy without its adapters.
    "SD3.5-medium@512": {
        "vae": [4],
        **{f"text {i}": [2] for i in (1, 2, 3)},
        "policy": [4] * 2,
    },
    "FLUX.1-dev@512": {"vae": [4], "text 1": [2], "text 2": [2], "policy": [4] * 2},
    "SANA-1.6B@1024": {"vae": [4], "text 1": [2], "policy": [4] * 2},
}
# Of the last block of an SD3 nobody reads what the text attends to.
UNREAD = {"SD3.5-medium@512": "transformer_blocks.1.attn.add_q_proj"}
VAE_UNITS = {"SD1.5@512": 1.39, "SDXL@1024": 0.72, "LCM@768": 1.21, "LCM-image@768": 1.21}
UNITS = {
    "SD1.5@512": (6.2, 6.2 + 2.8),
    "SDXL@1024": (6.2, 6.2 + 1.4),
    "LCM@768": (12.2, 16.6),
    "LCM-image@768": (6.2, 8.6),
}


class Both:
    """Ours and the straightforward step of a tiny model, with adapters that do something."""

    def __init__(self, name: str) -> None:
        pairs = make_pairs(TINY[name], PAIRS, CPU)
        self.ours = OurStep(TINY[name], pairs, CPU, EXACT)
        self.other = straightforward(TINY[name], pairs, CPU, torch.float32)
        for step in (self.ours, self.other):
            disturb(step)


def disturb(step: OurStep | StraightforwardStep) -> None:
    spread = {"sd": 0.1, "sdxl": 0.1, "lcm": 0.2}.get(step.model.family, 0.4)
    generator = torch.Generator().manual_seed(5)
    for parameter in trainable(step.policy):
        parameter.data.normal_(0, spread, generator=generator)


def is_lcm(step: OurStep | StraightforwardStep) -> bool:
    return step.model.family == "lcm"


def rounding(step: OurStep) -> float:
    """Of a logit: its scale times that of the errors, means of about 1 or less in float32."""
    beta = step.model.objective["beta"]
    return (beta if is_lcm(step) else beta / 2) * torch.finfo(torch.float32).eps


@pytest.fixture(scope="module", params=TINY)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def both(name):
    return Both(name)


# ---------------------------------------------------------------------------------- two steps


def test_both_steps_have_the_same_loss_and_gradients(both):
    batch = both.ours.batch()
    draw_ = batch.draw
    noise = keyed.normal(draw_.noise_keys, batch.noisy.shape[1:])
    guidance = None if draw_.solver is None else draw_.solver.guidance
    ours = both.ours.loss(batch)
    other = both.other.loss(Randomness(noise, draw_.timesteps, guidance))
    assert abs(ours.item() - 0.6931) > 0.01  # the adapters make a difference
    torch.testing.assert_close(ours, other, rtol=0, atol=2 * rounding(both.ours))
    names = [name for name, p in both.ours.policy.named_parameters() if p.requires_grad]
    assert names == [name for name, p in both.other.policy.named_parameters() if p.requires_grad]
    gradients = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, trainable(step.policy))])
        for loss, step in ((ours, both.ours), (other, both.other))
    ]
    assert gradients[0].norm() > 0
    assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[0].norm()


def test_a_step_trains_the_adapter_alone(both, name):
    unread = UNREAD.get(name, "none")
    for step in (both.ours, both.other):
        before = {name: p.clone() for name, p in step.policy.named_parameters()}
        step()
        changed = {n for n, p in step.policy.named_parameters() if not torch.equal(p, before[n])}
        assert changed == {n for n in before if "lora" in n and unread not in n}
        disturb(step)


def test_calls_are_those_of_the_design(both, name):
    both.ours()  # embeds the prompts: from here on they are cached
    with counted_calls(both.ours.networks()) as calls:
        both.ours()
    assert calls == OURS[name]
    with counted_calls(both.other.networks()) as calls:
        both.other()
    assert calls == STRAIGHTFORWARD[name]


@pytest.mark.parametrize("name", UNITS, indirect=True)
def test_tiny_unets_have_the_cost_ratios_of_the_real_ones(both, name):
    """Counted units, within 5 % of those at real size: a wide text encoder or VAE would flatter."""
    both.ours()
    unit, vae_units = bench_step.units_of(both.ours)
    assert vae_units == pytest.approx(VAE_UNITS[name], rel=0.01)
    counted = [count_flops(step) / unit / PAIRS for step in (both.ours, both.other)]
    # SDXL's policy costs 1.9 units here, 2.1 at real size, where it has ten layers a block.
    assert counted == pytest.approx(UNITS[name], rel=0.07 if name == "SDXL@1024" else 0.05)


@pytest.mark.parametrize("name", FLOW, indirect=True)
def test_a_straightforward_flow_step_costs_the_encoders_more(both):
    """Both have a pass of the policy, which is trained, and one of the reference."""
    both.ours()
    unit, vae_units = bench_step.units_of(both.ours)
    text_units = bench_step.text_flops_of(both.other) / unit
    ours, other = (count_flops(step) / unit / PAIRS for step in (both.ours, both.other))
    assert vae_units > 0.02 and text_units > 0.02
    assert other - ours == pytest.approx(2 * vae_units + text_units, rel=1e-6)
    frozen = count_flops(lambda: both.ours.module.ask_frozen(both.ours.batch())) / unit
    assert frozen == pytest.approx(2 * PAIRS, rel=1e-6)


def test_sana_is_told_where_its_text_ends():
    """Padding is masked: with other tokens behind its end the loss is the same, and with another
    mask it is not.
    """
    model = TINY["SANA-1.6B@1024"]
    step = straightforward(model, make_pairs(model, PAIRS, CPU), CPU, torch.float32)
    disturb(step)
    drawn = step.draw()
    ids, mask = step.tokens
    assert mask.sum(1).max() < mask.shape[1]
    loss = step.loss(drawn)
    step.tokens = [ids + (1 - mask), mask]
    torch.testing.assert_close(step.loss(drawn), loss, rtol=0, atol=1e-6)
    step.tokens = [ids, torch.ones_like(mask)]
    assert abs(step.loss(drawn) - loss) > 1e-5


@pytest.mark.slow
@pytest.mark.long
def test_units_of_flow_models_at_real_size():
    """Units a pair, ours and straightforward, as docs/performance.md has them."""
    out = Console(record=True, file=io.StringIO(), width=150)
    bench_step.count_real(FLOW, out)
    counted = re.findall(r"(\S+) units a pair", out.export_text())
    expected = [6.35, 8.29, 6.18, 6.51, 6.01, 10.21]
    assert [*map(float, counted)] == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
@pytest.mark.long
def test_units_of_the_consistency_step_at_real_size():
    """12.2 and 16.6 by the rule of 2.1 units for a policy's image; 2.28 counted at 768 pixels."""
    out = Console(record=True, file=io.StringIO(), width=150)
    bench_step.count_real(["LCM@768"], out)
    text = out.export_text()
    assert "unit 2.148 TFLOP, VAE 1.21 units" in text
    counted = [float(line.split()[1]) for line in text.splitlines() if "units a pair" in line]
    assert counted == pytest.approx([12.2, 16.6], rel=0.03)
    assert calls_text({name: [n // 2 for n in c] for name, c in OURS["LCM@768"].items()}) in text


# --------------------------------------------------------------------------------------- knobs


@pytest.mark.parametrize(
    "name",
    ["SD1.5@512", "SD3.5-medium@512", pytest.param("SDXL@1024", marks=pytest.mark.long)],
    indirect=True,
)
def test_knobs_change_the_cost_and_not_the_loss(both, name):
    pairs, model = both.ours.pairs, TINY[name]
    expected = OurStep(model, pairs, CPU, EXACT)
    disturb(expected)
    expected = expected.loss(expected.batch())
    assert abs(expected.item() - 0.6931) > 0.01
    changed = bench_step.variants(model, EXACT, on_gpu=False, compiles=False)
    calls = {}
    for knob, knobs in changed.items():
        differing = [
            f.name for f in fields(Knobs) if getattr(knobs, f.name) != getattr(EXACT, f.name)
        ]
        assert len(differing) == 1
        if knobs.precision == "bf16" or knobs.quantization:
            continue
        step = OurStep(model, pairs, CPU, knobs)
        disturb(step)
        loss = step.loss(step.batch())
        torch.testing.assert_close(loss, expected, rtol=0, atol=4 * rounding(step))
        with counted_calls(step.networks()) as calls[knob]:
            step()
        if not knobs.twin_reference:
            own = {p.data_ptr() for p in step.policy.parameters()}
            assert not own & {p.data_ptr() for p in step.module.reference.parameters()}
    assert calls.pop("latents encoded live") == OURS[name] | {"vae": [4]}
    encoders = {part: [2] for part in STRAIGHTFORWARD[name] if part.startswith("text")}
    assert calls.pop("text encoded live") == OURS[name] | encoders
    assert calls.pop("activation checkpointing") == OURS[name]  # blocks run again, not networks
    assert all(each == OURS[name] for each in calls.values())


@pytest.mark.long
def test_a_captured_step_is_replayed_or_says_that_it_is_not(monkeypatch):
    """By a stand-in for CUDA graphs, which without it cannot be had here."""
    model, captured = TINY["SD1.5@512"], replace(EXACT, captured=True)
    pairs = make_pairs(model, 1, CPU)
    replayed = partial(CapturedLoss, recorder=Tape)
    monkeypatch.setattr(ours, "CapturedLoss", replayed)
    steps = [OurStep(model, pairs, CPU, knobs) for knobs in (EXACT, captured)]
    for step in (*steps, *steps):
        step()
    plain, taped = (torch.cat([p.flatten() for p in step.update.parameters]) for step in steps)
    assert torch.equal(plain, taped) and steps[1].module.captured.captures == 1
    monkeypatch.setattr(Tape, "record", Mock(side_effect=RuntimeError("no graphs here")))
    with pytest.raises(NotCaptured):
        OurStep(model, pairs, CPU, captured)()


def test_a_step_of_free_rounding_is_so_within(monkeypatch):
    model, seen = TINY["SD1.5@512"], []
    step = OurStep(model, make_pairs(model, 1, CPU), CPU, replace(EXACT, free_rounding=True))
    chosen = torch.backends.cudnn
    monkeypatch.setattr(step, "batch", lambda: seen.append(chosen.benchmark) or OurStep.batch(step))
    step()
    assert seen == [True] and not chosen.benchmark


def test_knobs_of_a_gpu_are_those_that_do_something_there():
    def on_cuda(name):
        knobs = Knobs.for_device(torch.device("cuda"), TINY[name])
        return bench_step.variants(TINY[name], knobs, on_gpu=True, compiles=True)

    cuda, flow = on_cuda("SD1.5@512"), on_cuda("FLUX.1-dev@512")
    of_unets = {"layers not fused", "contiguous images", "attention by the engine's rule"}
    assert set(cuda) - set(flow) == of_unets
    assert set(flow) - set(cuda) == {"base in nf4", "base in int8", "base in fp8"}
    assert {"layers not fused", "contiguous images", "fp32", "blocks compiled"} < set(cuda)
    assert cuda["loss and noise in PyTorch"].kernels == "torch"
    assert cuda["captured as CUDA graphs"].captured
    assert not cuda["layers not fused"].fused_layers and cuda["layers not fused"].channels_last


# ------------------------------------------------------------------------- counting and results


def test_operations_of_attention_on_a_cpu_by_hand():
    """Two heads, 16 x 16 scores of width 8: two products, 2 * 2 * (16 * 16 * 8) each; twice and a
    half as many in the backward, which makes the scores again."""
    query = torch.randn(1, 2, 16, 8, requires_grad=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    forward = 2 * 2 * 2 * 16 * 16 * 8
    assert count_flops(lambda: attend(query, query, query)) == forward
    assert count_flops(lambda: attend(query, query, query).sum().backward()) == 3.5 * forward


def made_up_step(ms: float, peak: float | None = 989.0) -> dict:
    return step_row(
        [ms] * 5,
        pairs=4,
        flops=8 * 10**12,
        unit_flops=10**12,
        calls={"policy": [8], "teacher": [4, 4]},
        peak_gib=12.5,
        peak_tflops=peak,
    )


def made_up_result() -> dict:
    """A GPU's: 4 pairs in 20 ms are 200 pairs/s; 8 TFLOP in 20 ms are 400 TFLOP/s."""
    spread = {"p20": 1.4, "median": 1.5, "p80": 1.6}
    row = {
        "model": "M@64",
        "pairs": 4,
        "precision": "bf16",
        "steps": {"ours": made_up_step(20.0), "straightforward": made_up_step(30.0, None)},
        "speedup": spread,
        "knobs": {
            "fp32": {"time": spread, "peak_gib": 20.0},
            "blocks compiled": {"time": None, "failed": "does not compile here"},
        },
    }
    device = {"type": "cuda", "name": "made up", "driver": "1"}
    return {"device": device, "date": "2026-01-01", "tiny": False, "note": "n", "models": [row]}


def test_a_row_by_hand():
    row = made_up_step(20.0)
    assert row["pairs_per_s"]["median"] == pytest.approx(200)
    assert row["units_per_pair"] == 2
    assert row["units_per_s"] == pytest.approx(400)
    assert row["tflop_per_s"] == pytest.approx(400)
    assert row["share_of_peak"] == pytest.approx(400 / 989)
    assert made_up_step(20.0, None)["share_of_peak"] is None


def test_the_peak_is_used_only_where_it_is_known():
    assert peak_tflops("NVIDIA H200", "bf16") == 989
    assert peak_tflops("NVIDIA H200", "fp32") is None
    assert peak_tflops("another one", "bf16") is None


def test_tables_and_plot_of_a_gpu(tmp_path):
    result = made_up_result()
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(steps_table(result))
    console.print(knobs_table(result))
    shown = console.export_text()
    expected = ("200.00", "40.4%", "12.5", "1.50 [1.40, 1.60]", "policy 1×8, teacher 2×4")
    assert all(text in shown for text in (*expected, "20.0 GiB", "does not compile here"))
    assert list(bars_of(result["models"][0])) == ["straightforward loop", "fp32"]
    assert draw(result, tmp_path / "step.png").read_bytes()[:4] == b"\x89PNG"


# ---------------------------------------------------------------------------------- the script


@pytest.mark.skipif(GPU, reason="checks what a run without a GPU says")
def test_tiny_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_step, "TINY_BUDGET_S", (0.0, 0.0))
    kept = {"text encoded live": replace(EXACT, cached_text=False)}
    monkeypatch.setattr(bench_step, "variants", lambda *_: kept)
    out, history = tmp_path / "step.json", tmp_path / "history.jsonl"
    arguments = ["--tiny", "--models", "SD1.5@512", "--pairs", "1", "--out", str(out)]
    assert bench_step.main([*arguments, "--history", str(history)]) == 0
    result = json.loads(out.read_text())
    (row,) = result["models"]
    assert result["note"].startswith("ratios of processor time")
    assert row["pairs"] == 1 and row["precision"] == "fp32"
    for step in row["steps"].values():
        assert set(step) == {"units_per_pair", "calls", "peak_gib"}
        assert step["peak_gib"] is None
    assert row["steps"]["ours"]["calls"] == {"reference": [2], "policy": [2]}
    assert row["speedup"]["p20"] <= row["speedup"]["median"] <= row["speedup"]["p80"]
    assert row["knobs"]["text encoded live"]["time"]["median"] > 0
    assert out.with_suffix(".png").stat().st_size > 10_000
    (kept_row,) = map(json.loads, history.read_text().splitlines())
    assert set(kept_row["figures"]["SD1.5@512"]) == {
        "pairs",
        "precision",
        "speedup",
        "units_per_pair",
    }
    assert "first row of CPU" in capsys.readouterr().out


def test_fewer_pairs_are_taken_where_memory_ends(monkeypatch):
    tried = []

    class Comparison:
        def __init__(self, name, model, count, device, knobs):
            tried.append(count)
            if count > 2:
                raise torch.OutOfMemoryError("too large")

        def measure(self, budget_s):
            return made_up_result()["models"][0]

        def measure_knob(self, knobs, budget_s):
            return {"time": None, "failed": "out of memory"}

    monkeypatch.setattr(bench_step, "Comparison", Comparison)
    options = bench_step.parse(["--tiny", "--pairs", "9"])
    row = bench_step.compare("SD1.5@512", TINY["SD1.5@512"], options, CPU)
    assert tried == [9, 4, 2]
    assert row["knobs"]["text encoded live"]["failed"] == "out of memory"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tiny", "--pairs", "0"], "at least one pair"),
        (["--tiny", "--models", "SD9"], "invalid choice"),
        pytest.param([], "give --tiny", marks=pytest.mark.skipif(GPU, reason="has a GPU")),
    ],
)
def test_bad_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench_step.parse(arguments)
    assert message in capsys.readouterr().err


def test_tiny_and_real_models_go_by_the_same_names():
    assert list(TINY) == list(REAL)
    assert [m.family for m in TINY.values()] == [m.family for m in REAL.values()]
    assert [name.split("@")[1] for name in REAL] == [str(m.side) for m in REAL.values()]
