"""Fixtures of the kernel tests.

`backend` runs a test on PyTorch and, where this process can, on Triton: on a GPU, or else
in the interpreter if the process was started with TRITON_INTERPRET=1. Triton reads that variable
when kernels are defined, and the rest of the test suite wants them uninterpreted; so in an ordinary
run `test_interpreter.py` starts a second pytest for the interpreted half.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from cdpo.kernels import use
from cdpo.kernels.dispatch import HAS_TRITON, INTERPRETED
from operations import operations as operations
from torch import Tensor

TRITON_RUNS = HAS_TRITON and (INTERPRETED or torch.cuda.is_available())


def spare_the_interpreter() -> None:
    """What Triton's interpreter does again and again to no effect, which is half of its calls.

    It patches all of its language anew at every call of a device function: all is patched when the
    launch begins, and until it ends. It computes for each sum of integers whether it overflowed,
    for an assertion that is left out without `debug`. And it makes a table of all dtypes to look
    one up.
    """
    from triton import language
    from triton.runtime import interpreter

    everything = SimpleNamespace(__globals__={"tl": language, "core": language.core})
    patch = interpreter._patch_lang
    interpreter._patch_lang = lambda fn: patch(everything)
    interpreter.InterpretedFunction.__call__ = lambda self, *a, **k: self.rewrite()(*a, **k)
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    assert not builder.options.debug
    look_up, known = interpreter._get_np_dtype, {}

    def dtype_of(type_: Any) -> Any:
        if (found := known.get(type_.name)) is None:
            found = known[type_.name] = look_up(type_)
        return found

    interpreter._get_np_dtype = dtype_of


if INTERPRETED:
    spare_the_interpreter()


@pytest.fixture(params=["torch", *["triton"] * TRITON_RUNS])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use(request.param):
        yield request.param


@pytest.fixture
def device(backend: str) -> torch.device:
    on_gpu = backend == "triton" and torch.cuda.is_available() and not INTERPRETED
    return torch.device("cuda" if on_gpu else "cpu")


@pytest.fixture
def poison() -> Iterator[None]:
    """Fresh memory holds NaN, so that an element nobody writes is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Fences:
    """Tensors with sentinels before and behind them in memory, to be found unharmed.

    A read outside of a tensor meets NaN, which spreads; a write outside is seen by `intact`.
    """

    PAD = 1 << 13  # elements: more than any tile of a kernel

    def __init__(self) -> None:
        self._fences: list[Tensor] = []

    def around(self, tensor: Tensor) -> Tensor:
        """The tensor's values with its strides, between two fences."""
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        sentinel = float("nan") if tensor.is_floating_point() else -77
        buffer = torch.full((span + 2 * self.PAD,), sentinel, dtype=tensor.dtype)
        buffer = buffer.to(tensor.device)
        self._fences += [buffer[: self.PAD], buffer[-self.PAD :]]
        view = buffer.as_strided(tensor.shape, tensor.stride(), self.PAD)
        return view.copy_(tensor.detach())

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From now on fresh memory is fenced too, whichever way it is asked for."""
        for owner, name in ((Tensor, "new_empty"), (torch, "empty_like"), (torch, "empty")):
            make: Callable[..., Tensor] = getattr(owner, name)
            fenced = lambda *a, _make=make, **k: self.around(_make(*a, **k))  # noqa: E731
            monkeypatch.setattr(owner, name, fenced)

    def intact(self) -> bool:
        return len(self._fences) > 0 and all(
            bool((x.isnan() if x.is_floating_point() else x == -77).all()) for x in self._fences
        )


@pytest.fixture
def fences() -> Fences:
    return Fences()


@pytest.fixture(scope="session")
def machine_code() -> Iterator[ModuleType]:
    """What a kernel's machine code costs, and a driver for which a GPU is there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        yield importlib.import_module("kernel_bench.machine_code")
