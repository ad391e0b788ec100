"""Every kernel at awkward sizes in the interpreter: each address it touches lies in an argument.

A sentinel around a tensor shows a stray read only if the value reaches a result. Here the
interpreter's own loads and stores are watched: whatever their mask lets through must lie within a
tensor that the launch was given. And tickets must be left as they were found.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import cdpo.kernels as kernels
import numpy as np
import pytest
import torch
from cdpo.kernels import SchedulePoint, dispatch
from cdpo.kernels.dispatch import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="watches Triton's interpreter")
PAIRS_AND_SHAPES = [(3, (1,)), (1, (7,)), (1, (3, 683)), (3, (2, 31, 33))]


class Watch:
    """Addresses of the launch in progress, and what was touched outside of them."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.touched = 0
        self.astray: list[str] = []

    def launch(self, arguments: Any) -> None:
        self.ranges = []
        for argument in arguments:
            tensor = getattr(argument, "base", argument)
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                steps = zip(tensor.shape, tensor.stride(), strict=True)
                span = 1 + sum((size - 1) * stride for size, stride in steps)
                first = tensor.data_ptr()
                self.ranges.append((first, first + span * tensor.element_size()))

    def touch(self, what: str, pointers: Any, mask: Any, width: int) -> None:
        pointers, mask = np.broadcast_arrays(np.asarray(pointers.data), np.asarray(mask.data))
        live = pointers[mask.astype(bool)].astype(np.int64)
        inside = np.zeros(live.shape, bool)
        for first, end in self.ranges:
            inside |= (live >= first) & (live + width <= end)
        self.touched += live.size
        if not inside.all():
            self.astray.append(f"{what}: {np.count_nonzero(~inside)} of {live.size} addresses")


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    from triton.runtime import interpreter

    seen, builder = Watch(), type(interpreter.interpreter_builder)
    arguments = interpreter.GridExecutor._init_args_hst
    load, store = builder.create_masked_load, builder.create_masked_store

    def init_args(self: Any, args: Any, named: Any) -> Any:
        made = arguments(self, args, named)
        seen.launch([*made[0], *made[1].values()])
        return made

    def width(pointers: Any) -> int:
        return np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize

    def masked_load(self: Any, pointers: Any, mask: Any, *more: Any) -> Any:
        seen.touch("load", pointers, mask, width(pointers))
        return load(self, pointers, mask, *more)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *more: Any) -> Any:
        seen.touch("store", pointers, mask, width(pointers))
        return store(self, pointers, value, mask, *more)

    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", init_args)
    monkeypatch.setattr(builder, "create_masked_load", masked_load)
    monkeypatch.setattr(builder, "create_masked_store", masked_store)
    yield seen
    assert seen.touched > 1000
    assert not seen.astray


@pytest.mark.parametrize(
    ("shape", "groups", "affine"),
    [
        ((2, 12, 5, 7), 3, True),
        ((2, 12, 5, 7), 3, False),
        ((1, 70, 11), 2, False),
        ((1, 1, 2), 1, True),
        ((3, 65, 1, 1), 5, True),
        ((1, 8, 1031), 2, False),
    ],
    ids=str,
)
def test_triton_group_norm_silu(watch, shape, groups, affine):
    x = torch.randn(shape).bfloat16().requires_grad_()
    parameters = [torch.ones(shape[1], requires_grad=True) for _ in range(2 * affine)]
    kernels.group_norm_silu(x, groups, *parameters).float().sum().backward()
    kernels.group_norm_silu(torch.randn(8, 16, 9, 9), 4)


@pytest.mark.parametrize("shape", [(3, 5, 14), (1, 2), (2, 2050)], ids=str)
def test_triton_geglu(watch, shape):
    x = torch.randn(shape, requires_grad=True)
    kernels.geglu(x).sum().backward()
    kernels.geglu(torch.randn(9, 300))


@pytest.mark.parametrize(("pairs", "shape"), PAIRS_AND_SHAPES, ids=str)
def test_triton_noise(watch, shape, pairs):
    keys, ones = torch.zeros(pairs, 4, dtype=torch.int64), torch.ones(pairs)
    latents = torch.randn(2 * pairs, *shape)
    for target in ("epsilon", "flow", "sample", "v_prediction", "affine"):
        factors = (ones, ones) if target == "affine" else None
        options = {"target": target, "factors": factors}
        kernels.paired_add_noise(latents, keys, ones, ones, **options)
        image = torch.randn(2 * pairs, 3, 11, 5).to(memory_format=torch.channels_last)
        kernels.paired_add_noise(image, keys, ones, ones, **options)
    kernels.philox_normal(keys, shape)


@pytest.mark.parametrize(("pairs", "shape"), PAIRS_AND_SHAPES, ids=str)
def test_triton_losses_and_consistency(watch, shape, pairs):
    draw = lambda count: torch.randn(count, *shape)  # noqa: E731
    for distance, cached, shared in itertools.product(("mse", "pseudo_huber"), (0, 1), (0, 1)):
        policy = draw(2 * pairs).requires_grad_()
        reference = torch.rand(2 * pairs) if cached else draw(2 * pairs)
        target = draw(pairs if shared else 2 * pairs)
        options = {"slopes": torch.ones(pairs), "weights": torch.ones(pairs), "safeguard": 0.9}
        for more in ({}, options):
            args = (policy, reference, target, 1.0)
            kernels.paired_dpo_loss(*args, distance=distance, **more).loss.backward()
    point = SchedulePoint(
        torch.ones(pairs, dtype=torch.int64), torch.ones(pairs), torch.ones(pairs)
    )
    noisy = draw(2 * pairs)
    kernels.consistency_solver_step(draw(4 * pairs), noisy, point.alpha, point, point)
    scales = kernels.ConsistencyScales(point.alpha, point.sigma)
    kernels.consistency_targets(noisy, noisy, noisy, scales, scales)
    kernels.geglu(torch.randn(9, 300))  # the smallest shapes touch little


def test_triton_tickets_are_left_as_they_were_found(monkeypatch):
    """On a GPU they are kept from launch to launch: one that is not zero spoils the next."""
    import importlib

    kept = torch.zeros(64, dtype=torch.int32)
    for name in ("paired_dpo_loss", "group_norm_silu"):
        module = importlib.import_module(f"cdpo.kernels.{name}.op")
        monkeypatch.setattr(module, "zero_tickets", lambda count, device: kept)
    x = torch.randn(3, 12, 40, 41, requires_grad=True)
    policy = torch.randn(6, 5000, requires_grad=True)
    results = []
    for _ in range(2):
        out = kernels.group_norm_silu(x, 3)
        (grad,) = torch.autograd.grad(out.sum(), x)
        loss = kernels.paired_dpo_loss(policy, torch.zeros(6, 5000), torch.ones(3, 5000), 1.0).loss
        assert not kept.any()
        results.append((out.detach(), grad, loss.detach()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_triton_tickets_are_fresh_on_a_cpu():
    first, second = (dispatch.zero_tickets(3, torch.device("cpu")) for _ in range(2))
    assert first.data_ptr() != second.data_ptr()
    assert not first.any()
