"""The Consistency-DPO step: memory and strides, absent inputs, torch.library, bad input."""

import importlib
import math
from typing import Any

import pytest
import torch
from cdpo.kernels import consistency_outputs, consistency_solver_step, paired_dpo_loss
from consistency_cases import LATENTS, NETWORKS, PREDICTIONS, Case, make
from torch import Tensor

module = importlib.import_module("cdpo.kernels.consistency_step.op")


# ---------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_element_is_written(backend, device, poison, prediction):
    case = make(3, (5, 411), prediction=prediction, device=device)
    found, grad = case.outputs_and_grad(torch.ones_like(case.noisy))
    assert all(x.isfinite().all() for x in (case.solve(), *found, grad))


@pytest.mark.parametrize("shape", [(7,), (3, 1001)], ids=str)
def test_reads_and_writes_nothing_outside(backend, device, fences, monkeypatch, shape):
    case = make(2, shape, device=device)
    grad_output = torch.randn(case.policy.shape, device=device)
    expected = (case.solve(), *case.outputs_and_grad(grad_output)[0])
    expected_grad = case.outputs_and_grad(grad_output)[1]
    fenced = case.map(fences.around, "teacher", "guidance", *LATENTS).points(fences.around)
    fenced.policy.requires_grad_()
    grad_output = fences.around(grad_output)
    fences.watch(monkeypatch)
    outputs = fenced.outputs()
    found = (fenced.solve(), *outputs)
    (grad,) = torch.autograd.grad(outputs.policy, fenced.policy, grad_output)
    monkeypatch.undo()
    assert fences.intact()
    assert torch.equal(grad, expected_grad)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_backward_is_one_operation_and_keeps_no_latents(backend, device, operations):
    """By default autograd would make zeros for the two outputs that have no gradient."""
    case = make(device=device)
    policy = case.policy.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        found = case.outputs()
    assert [x.shape for x in kept] == [case.guidance.shape] * 3
    grad_output = torch.ones_like(found.policy)
    with operations:
        torch.autograd.grad(found.policy, policy, grad_output)
    assert [name for name in operations.names if name != "aten::detach"] == [
        "cdpo::consistency_outputs_backward"
    ]


class Recorded:
    """Stands in for a kernel and notes the grid and the memory of every launch."""

    def __init__(self, kernel: Any, launches: list[tuple[int, set[int]]]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> Any:
            pointers = {x.data_ptr() for x in arguments if isinstance(x, Tensor)}
            self.launches.append((math.prod(grid), pointers))
            return self.kernel[grid](*arguments, **options)

        return launch


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
    for name in ("solver_kernel", "outputs_kernel", "backward_kernel"):
        monkeypatch.setattr(module, name, Recorded(getattr(module, name), launches))
    previous = case.solve()
    policy = case.policy.detach().requires_grad_()
    outputs = case._replace(policy=policy).outputs()
    grad_output = torch.randn_like(outputs.policy)
    (grad,) = torch.autograd.grad(outputs.policy, policy, grad_output)

    read = [(case.teacher, case.noisy), [getattr(case, n) for n in LATENTS], (grad_output,)]
    written = [(previous,), outputs, (grad,)]
    assert len(launches) == 3
    for (programs, pointers), before, after in zip(launches, read, written, strict=True):
        assert programs == 4 * math.ceil(4 * 17 * 16 / module.MAX_BLOCK)
        assert {x.data_ptr() for x in (*before, *after)} <= pointers
    if layout == "channels_last":
        results = (previous, *outputs, grad)
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
    expected, expected_grad = case.outputs_and_grad(case.noisy)
    previous = case.solve()
    case = case.map(ODD_LAYOUTS[leader], "policy", "noisy")
    case = case.map(ODD_LAYOUTS[other], "teacher", "reference", "target", "previous")
    found, grad = case.outputs_and_grad(ODD_LAYOUTS[other](case.noisy))
    assert torch.equal(case.solve(), previous)
    assert torch.equal(grad, expected_grad)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_numbers_of_pairs_with_strides_and_expanded_gradient(backend, device):
    case = make(device=device)
    ones = torch.ones((), device=device).expand(case.policy.shape)
    expected, expected_grad = case.outputs_and_grad(ones.contiguous())
    spread = lambda x: torch.stack([x, x], dim=1)[:, 0]  # noqa: E731
    again = case.map(spread, "guidance").points(spread)
    found, grad = again.outputs_and_grad(ones)
    assert torch.equal(again.solve(), case.solve())
    assert torch.equal(grad, expected_grad)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_pair_depends_on_itself_alone(backend, device):
    case = make(4, (3, 400), device=device)
    pair = [2, 6]
    alone = case.map(lambda x: x[pair], *LATENTS).points(lambda x: x[2:3])
    alone = alone._replace(teacher=case.teacher[[2, 6, 10, 14]], guidance=case.guidance[2:3])
    assert torch.equal(alone.solve(), case.solve()[pair])
    for one, all_of_them in zip(alone.outputs(), case.outputs(), strict=True):
        assert torch.equal(one, all_of_them[pair])


# --------------------------------------------------------------------------------- cached passes

NO_TARGET = {"target": None, "previous": None, "earlier": None}


@pytest.mark.parametrize(
    "absent", [{"reference": None}, NO_TARGET, {"reference": None} | NO_TARGET]
)
def test_cached_passes_are_neither_read_nor_written(backend, device, absent):
    case = make(device=device)
    grad_output = torch.randn_like(case.noisy)
    expected, expected_grad = case.outputs_and_grad(grad_output)
    found, grad = case._replace(**absent).outputs_and_grad(grad_output)
    assert torch.equal(grad, expected_grad)
    for name in NETWORKS:
        if name in absent:
            assert getattr(found, name) is None
        else:
            assert torch.equal(getattr(found, name), getattr(expected, name))


# ------------------------------------------------------------------------------------ torch.library


@pytest.mark.parametrize(
    ("dtype", "absent"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"reference": None}),
        (torch.float32, {"reference": None} | NO_TARGET),
    ],
    ids=str,
)
def test_opcheck(backend, device, dtype, absent):
    case = make(2, (2, 3, 3), (dtype,) * 6, device=device)
    case = case.map(LAYOUTS["channels_last"], "policy")
    teacher_step = (case.teacher, case.noisy, case.guidance, *case.now[1:], *case.earlier[1:])
    torch.library.opcheck(
        torch.ops.cdpo.consistency_solver_step, (*teacher_step, "epsilon", torch.float16)
    )
    scalars = ("v_prediction", 10.0, 0.5)
    given = case._replace(policy=case.policy.requires_grad_(), **absent)
    args = [getattr(given, name) for name in LATENTS]
    args += [*given.now, *(given.earlier or [None] * 3), *scalars]
    torch.library.opcheck(torch.ops.cdpo.consistency_outputs, args)
    grad_output = torch.randn(case.noisy.shape, device=device)
    args = (grad_output, *case.now, *scalars, dtype)
    torch.library.opcheck(torch.ops.cdpo.consistency_outputs_backward, args)


def test_compiles_without_graph_breaks(backend, device):
    def step(case: Case) -> tuple[Tensor | None, ...]:
        case = case._replace(previous=case.solve(torch.float32), policy=case.policy.tanh())
        outputs = case.outputs()
        loss = paired_dpo_loss(*outputs, 200.0, distance="pseudo_huber").loss
        cached = case._replace(reference=None).outputs()
        return loss, *outputs, *cached

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for pairs, width in ((2, 5), (3, 7)):
        case = make(pairs, (2, width), (torch.bfloat16,) * 6, device=device)
        case.policy.requires_grad_()
        expected, found = step(case), compiled(case)
        for a, b in zip(found, expected, strict=True):
            assert a is b is None or torch.equal(a, b)
        (grad,) = torch.autograd.grad(expected[0], case.policy)
        (found_grad,) = torch.autograd.grad(found[0], case.policy)
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
        (ValueError, r"policy is \(3, 3\); taken is \(2B", {"policy": torch.zeros(3, 3)}),
        (ValueError, r"policy is \(0, 3\)", {"policy": torch.zeros(0, 3)}),
        (ValueError, r"policy is \(2,\)", {"policy": torch.zeros(2)}),
        (
            ValueError,
            r"reference is \(2, 4\); it must be \(2, 3\)",
            {"reference": torch.zeros(2, 4)},
        ),
        (ValueError, r"noisy is \(4, 3\); it must be \(2, 3\)", {"noisy": torch.zeros(4, 3)}),
        (TypeError, r"target is torch.int64", {"target": SMALL.target.long()}),
        (TypeError, r"previous is torch.complex64", {"previous": SMALL.previous.cfloat()}),
        (TypeError, r"now.timesteps is torch.int32", {"now": BAD_POINTS["int32 timesteps"]}),
        (TypeError, r"earlier.alpha is torch.float64", {"earlier": BAD_POINTS["float64 alpha"]}),
        (ValueError, r"now.sigma is \(2,\)", {"now": BAD_POINTS["one sigma too many"]}),
        (ValueError, r"prediction is 'x0'; taken are epsilon", {"prediction": "x0"}),
        (ValueError, r"timestep_scaling is 0", {"timestep_scaling": 0.0}),
        (ValueError, r"sigma_data is -0.5; it must be positive", {"sigma_data": -0.5}),
        (ValueError, r"sigma_data is nan", {"sigma_data": math.nan}),
        (ValueError, r"previous is None; target, previous and earlier", {"previous": None}),
        (ValueError, r"target and earlier is None", {"target": None, "earlier": None}),
        (ValueError, r"one device; given.*target on meta", {"target": SMALL.target.to("meta")}),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_bad_input_of_the_functions(error, message, arguments):
    good = {name: getattr(SMALL, name) for name in (*LATENTS, "now", "earlier")}
    with pytest.raises(error, match=message):
        consistency_outputs(**(good | arguments))
