"""NaN and infinity in files of tensors are found, and what holds them is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cdpo.engine.training.checkpoint.layout import Fragment, Layout
from cdpo.engine.training.finite import NotFiniteError, check_finite
from safetensors.torch import save_file

NAN, INF = float("nan"), float("inf")

FLAT = Layout(2, {"down.a": Fragment(0, 0, 0, 4), "up.b": Fragment(0, 4, 0, 6)}, {})
CUT = Layout(3, {"down.a": Fragment(0, 0, 4, 4), "up.b": Fragment(1, 0, 0, 10)}, {})
PARTITION = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


def bad(at: int, size: int = 10) -> torch.Tensor:
    numbers = torch.zeros(size)
    numbers[at] = NAN
    return numbers


def of_stage_2(weights: Any = None, **state: torch.Tensor) -> dict[str, Any]:
    return {
        "base_optimizer_state": {"state": {0: {"step": torch.tensor(2.0), **state}}},
        "single_partition_of_fp32_groups": [torch.zeros(10) if weights is None else weights],
    }


def of_stage_3(flat: int, **state: torch.Tensor) -> dict[str, Any]:
    weights = [torch.zeros(4), torch.zeros(10)]
    return {"fp32_flat_groups": weights, "optimizer_state_dict": {"state": {flat: state}}}


@pytest.mark.parametrize(
    ("layout", "state", "named"),
    [
        (FLAT, of_stage_2(bad(3)), "float32 weight of down.a is not finite (nan)"),
        (FLAT, of_stage_2(exp_avg=bad(4)), "first moment of Adam of up.b"),
        (FLAT, of_stage_2(exp_avg_sq=bad(9)), "second moment of Adam of up.b"),
        (FLAT, of_stage_2(ema=bad(0)), "moving average of down.a"),
        (CUT, of_stage_3(0, ema=bad(3, 4)), "moving average of down.a"),
        (CUT, of_stage_3(1, exp_avg=bad(3)), "first moment of Adam of up.b"),
        (None, of_stage_2(bad(3)), f"float32 weight 3 in {PARTITION}"),
    ],
)
def test_a_tensor_of_a_partition_is_named(
    tmp_path: Path, layout: Layout | None, state: Any, named: str
) -> None:
    """By the parameter, as users know it, wherever ZeRO has put it; by its place without table."""
    if layout is not None:
        layout.save(tmp_path, 1)
    torch.save({"optimizer_state_dict": state}, tmp_path / PARTITION)
    with pytest.raises(NotFiniteError) as told:
        check_finite(tmp_path / PARTITION)
    assert str(told.value).startswith(named)


def test_weights_of_a_network_are_named_and_its_constants_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "mp_rank_00_model_states.pt"
    content = {"module": {"unet.weight": torch.zeros(3), "mask": bad(1)}, "buffer_names": ["mask"]}
    torch.save(content, path)
    check_finite(path)
    content["module"]["unet.weight"][1] = -INF
    torch.save(content, path)
    with pytest.raises(NotFiniteError, match=r"^unet\.weight in mp_rank_.* not finite \(-inf\)$"):
        check_finite(path)


def test_an_adapter_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({"a": torch.zeros(2), "b": bad(1)}, path)
    with pytest.raises(NotFiniteError, match=r"^b in lora\.safetensors"):
        check_finite(path)


@pytest.mark.parametrize("name", ["lora.safetensors", PARTITION, "recipe.yaml", "gone.pt"])
def test_what_cannot_be_read_is_another_s_to_refuse(tmp_path: Path, name: str) -> None:
    if name != "gone.pt":
        (tmp_path / name).write_bytes(b"no tensors")
    check_finite(tmp_path / name)
