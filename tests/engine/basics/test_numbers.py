"""A single number among many that is none is seen."""

import pytest
import torch
from cdpo.engine.basics.numbers import is_finite

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_one_number_among_many_is_found(dtype: torch.dtype, value: float) -> None:
    numbers = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert is_finite(numbers)
    numbers[2, 999] = value
    assert not is_finite(numbers)
    assert not is_finite(numbers.T)


@pytest.mark.parametrize(
    "numbers", [torch.empty(0), torch.tensor(3), torch.full((9,), 3e38), torch.tensor(1.0)]
)
def test_what_is_finite(numbers: torch.Tensor) -> None:
    assert is_finite(numbers)
