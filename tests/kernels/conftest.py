"""Fixtures of the kernel tests.

`backend` runs a test on PyTorch and, where this process can, on Triton: on a GPU, or else
in the interpreter if the process was started with TRITON_INTERPRET=1. Triton reads that variable
when kernels are defined, and the rest of the test suite wants them uninterpreted; so in an ordinary
run `test_interpreter.py` starts a second pytest for the interpreted half.
"""

from collections.abc import Iterator

import pytest
import torch
from cdpo.kernels import use
from cdpo.kernels.dispatch import HAS_TRITON, INTERPRETED

TRITON_RUNS = HAS_TRITON and (INTERPRETED or torch.cuda.is_available())


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
