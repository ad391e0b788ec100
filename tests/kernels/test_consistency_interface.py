"""The Consistency-DPO step: memory and strides, torch.library, bad input."""

import importlib
import math
from typing import Any

import pytest
import torch
from cdpo.kernels import (
    consistency_scales,
    consistency_solver_step,
    consistency_targets,
    paired_dpo_loss,
)
from consistency_cases import LATENTS, PREDICTIONS, Case, make
from torch import Tensor

module = importlib.import_module("cdpo.kernels.consistency_step.op")


# ---------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_element_is_written(backend, device, poison, prediction):
    case = make(3, (5, 411), prediction=prediction, device=device)
    assert all(x.isfinite().all() for x in (case.solve(), case.targets()))


@pytest.mark.parametrize("shape", [(7,), (3, 1001)], ids=str)
def test_reads_and_writes_nothing_outside(backend, device, fences, monkeypatch, shape):
    case = make(2, shape, device=device)
    expected = (case.solve(), case.targets())
    fenced = case.map(fences.around, "teacher", "guidance", *LATENTS).points(fences.around)
    fences.watch(monkeypatch)
    found = (fenced.solve(), fenced.targets())
    monkeypatch.undo()
    assert fences.intact()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "every_second": lambda x: torch.stack([x, x], dim=1)[:, 0],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_launch_reads_tensors_as_they_lie(backend, device, monkeypatch, layout):
    if backend == "torch":
        pytest.skip("PyTorch launches nothing of ours")
    case = make(2, (4, 17, 16), device=device)
    case = case.map(LAYOUTS[layout], "teacher", *LATENTS)
    launches: list[tuple[int, set[int]]] = []
    run = module.launch

    def noted(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        pointers = {x.data_ptr() for x in arguments if isinstance(x, Tensor)}
        launches.append((math.prod(grid), pointers))
        run(kernel, grid, *arguments, **constants)

    monkeypatch.setattr(module, "launch", noted)
    results = (case.solve(), case.targets())
    read = [(case.teacher, case.noisy), [getattr(case, name) for name in LATENTS]]
    assert len(launches) == 2
    for (programs, pointers), before, after in zip(launches, read, results, strict=True):
        assert programs == 4 * math.ceil(4 * 17 * 16 / module.MAX_BLOCK)
        assert {x.data_ptr() for x in (*before, after)} <= pointers
    if layout == "channels_last":
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x in results)


ODD_LAYOUTS = LAYOUTS | {
    "batch_innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "channel_slice": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
}
del ODD_LAYOUTS["expanded"]  # other values


@pytest.mark.parametrize("leader", ODD_LAYOUTS)
@pytest.mark.parametrize("other", ODD_LAYOUTS)
def test_any_strides(backend, device, leader, other):
    case = make(2, (3, 4, 5), device=device)
    expected = (case.solve(), case.targets())
    case = case.map(ODD_LAYOUTS[leader], "answer", "noisy")
    case = case.map(ODD_LAYOUTS[other], "teacher", "previous")
    found = (case.solve(), case.targets())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_numbers_of_pairs_with_strides(backend, device):
    case = make(device=device)
    spread = lambda x: torch.stack([x, x], dim=1)[:, 0]  # noqa: E731
    again = case.map(spread, "guidance").points(spread)
    assert torch.equal(again.solve(), case.solve())
    assert torch.equal(again.targets(), case.targets())


def test_a_pair_depends_on_itself_alone(backend, device):
    case = make(4, (3, 400), device=device)
    pair = [2, 6]
    alone = case.map(lambda x: x[pair], *LATENTS).points(lambda x: x[2:3])
    alone = alone._replace(teacher=case.teacher[[2, 6, 10, 14]], guidance=case.guidance[2:3])
    assert torch.equal(alone.solve(), case.solve()[pair])
    assert torch.equal(alone.targets(), case.targets()[pair])


# ------------------------------------------------------------------------------------ torch.library


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(backend, device, dtype):
    case = make(2, (2, 3, 3), (dtype,) * 4, device=device)
    case = case.map(LAYOUTS["channels_last"], "answer")
    teacher_step = (case.teacher, case.noisy, case.guidance, *case.now[1:], *case.earlier[1:])
    torch.library.opcheck(
        torch.ops.cdpo.consistency_solver_step, (*teacher_step, "epsilon", torch.float16)
    )
    latents = (case.answer, case.previous, case.noisy)
    torch.library.opcheck(
        torch.ops.cdpo.consistency_targets, (*latents, *case.scales, *case.earlier_scales)
    )


def test_compiles_without_graph_breaks(backend, device):
    def step(case: Case, policy: Tensor) -> tuple[Tensor, Tensor]:
        targets = case._replace(previous=case.solve(torch.float32)).targets()
        loss = paired_dpo_loss(
            *(policy.tanh(), case.answer, targets, 200.0),
            distance="pseudo_huber",
            slopes=case.scales.of_prediction,
        ).loss
        return loss, targets

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for pairs, width in ((2, 5), (3, 7)):
        case = make(pairs, (2, width), (torch.bfloat16,) * 4, device=device)
        policy = case.noisy.clone().requires_grad_()
        expected, found = step(case, policy), compiled(case, policy)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        (grad,) = torch.autograd.grad(expected[0], policy)
        (found_grad,) = torch.autograd.grad(found[0], policy)
        torch.testing.assert_close(found_grad, grad)


# -------------------------------------------------------------------------------------- bad input

SMALL = make(1, (3,))
BAD_POINTS = {
    "int32 timesteps": SMALL.now._replace(timesteps=torch.zeros(1, dtype=torch.int32)),
    "float64 alpha": SMALL.now._replace(alpha=torch.zeros(1).double()),
    "one sigma too many": SMALL.now._replace(sigma=torch.zeros(2)),
}


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"teacher is \(2, 3\); it must be \(4, 3\): cond", {"teacher": SMALL.noisy}),
        (ValueError, r"noisy is \(3, 3\); taken is \(2B", {"noisy": torch.zeros(3, 3)}),
        (ValueError, r"noisy is \(0, 3\)", {"noisy": torch.zeros(0, 3)}),
        (ValueError, r"noisy is \(2, 0\)", {"noisy": torch.zeros(2, 0)}),
        (TypeError, r"teacher is torch.int64", {"teacher": SMALL.teacher.long()}),
        (TypeError, r"noisy is torch.complex64", {"noisy": SMALL.noisy.cfloat()}),
        (TypeError, r"dtype is torch.float64; taken are", {"dtype": torch.float64}),
        (TypeError, r"guidance is torch.float64", {"guidance": SMALL.guidance.double()}),
        (ValueError, r"guidance is \(2,\); it must be \(1,\)", {"guidance": torch.zeros(2)}),
        (TypeError, r"now.timesteps is torch.int32", {"now": BAD_POINTS["int32 timesteps"]}),
        (TypeError, r"earlier.alpha is torch.float64", {"earlier": BAD_POINTS["float64 alpha"]}),
        (ValueError, r"now.sigma is \(2,\)", {"now": BAD_POINTS["one sigma too many"]}),
        (ValueError, r"prediction is 'flow'; taken are epsilon", {"prediction": "flow"}),
        (
            ValueError,
            r"one device; given.*guidance on meta",
            {"guidance": torch.zeros(1).to("meta")},
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_bad_input_of_the_solver(error, message, arguments):
    names = ("teacher", "noisy", "guidance", "now", "earlier")
    good = {name: getattr(SMALL, name) for name in names}
    with pytest.raises(error, match=message):
        consistency_solver_step(**(good | arguments))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"prediction is \(3, 3\); taken is \(2B", {"prediction": torch.zeros(3, 3)}),
        (ValueError, r"prediction is \(0, 3\)", {"prediction": torch.zeros(0, 3)}),
        (ValueError, r"noisy is \(4, 3\); it must be \(2, 3\)", {"noisy": torch.zeros(4, 3)}),
        (TypeError, r"previous is torch.complex64", {"previous": SMALL.previous.cfloat()}),
        (
            TypeError,
            r"now.of_noisy is torch.float64",
            {"now": SMALL.scales._replace(of_noisy=torch.zeros(1).double())},
        ),
        (
            ValueError,
            r"earlier.of_prediction is \(2,\)",
            {"earlier": SMALL.scales._replace(of_prediction=torch.zeros(2))},
        ),
        (ValueError, r"one device; given.*noisy on meta", {"noisy": SMALL.noisy.to("meta")}),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_bad_input_of_the_targets(error, message, arguments):
    good = {"prediction": SMALL.answer, "previous": SMALL.previous, "noisy": SMALL.noisy}
    good |= {"now": SMALL.scales, "earlier": SMALL.earlier_scales}
    with pytest.raises(error, match=message):
        consistency_targets(**(good | arguments))


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"prediction is 'x0'; taken are epsilon", {"prediction": "x0"}),
        (r"timestep_scaling is 0", {"timestep_scaling": 0.0}),
        (r"sigma_data is -0.5; it must be positive", {"sigma_data": -0.5}),
        (r"sigma_data is nan", {"sigma_data": math.nan}),
    ],
)
def test_bad_input_of_the_scales(message, arguments):
    with pytest.raises(ValueError, match=message):
        consistency_scales(SMALL.now, **arguments)
