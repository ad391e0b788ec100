"""The memory of a rank against an example worked by hand, for each ZeRO stage."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cdpo.engine.training.dry_run.memory import Row, Sizes, Zero, memory_rows, total

# 1000 parameters of two bytes, 100 of them trained; two ranks.
SIZES = Sizes(
    policy=1000,
    trained=100,
    frozen={"reference": 0},
    bytes_per_weight=2,
    text_encoders=50,
    vae=40,
    activations=7,
)


def by_name(rows: list[Row], place: str = "device") -> dict[str, int]:
    return {row.name: getattr(row, place) for row in rows if getattr(row, place)}


@pytest.mark.parametrize(
    ("stage", "weights", "gathered", "gradients"),
    [
        # All weights on each rank, all gradients: 1000 x 2, 100 x 2.
        (1, 2000, 0, 200),
        # Gradients divided by the two ranks.
        (2, 2000, 0, 100),
        # Weights divided as well; at most 600 elements are whole at once.
        (3, 1000, 1200, 100),
    ],
)
def test_each_stage_divides_what_it_says(
    stage: int, weights: int, gathered: int, gradients: int
) -> None:
    zero = Zero(stage=stage, world_size=2, bucket=30, num_buckets=2, most_gathered=600)
    rows = memory_rows(SIZES, zero)
    expected = {
        "policy weights": weights,
        "gathered weights": gathered,
        "gradients": gradients,
        "float32 gradients": 50 * 4,
        "AdamW, float32 weights": 50 * 3 * 4,
        "reduction buckets": 2 * 30 * 2,
        "text encoders": 50,
        "VAE, float32": 40,
        "activations": 7,
    }
    assert by_name(rows) == {name: size for name, size in expected.items() if size}
    assert total(rows).device == sum(expected.values())
    assert next(row.note for row in rows if row.name == "reference") == "the policy's own"


def test_weights_in_fewer_bits_are_whole_on_every_rank() -> None:
    """800 of the 1000 parameters take 450 bytes; stage 3 divides the other 200."""
    zero = Zero(stage=3, world_size=2, bucket=30, num_buckets=2, most_gathered=600)
    rows = by_name(memory_rows(replace(SIZES, in_fewer_bits=800, quantized=450), zero))
    assert rows["policy weights"] == 200 and rows["weights in fewer bits"] == 450
    assert rows["gathered weights"] == 400


def test_full_fine_tuning_has_a_reference_and_may_have_an_average() -> None:
    sizes = Sizes(
        policy=1000,
        trained=1000,
        frozen={"reference": 1000},
        bytes_per_weight=2,
        text_encoders=0,
        vae=0,
        activations=0,
        averaged=True,
    )
    zero = Zero(stage=3, world_size=4, bucket=10, num_buckets=1, most_gathered=10**9)
    rows = by_name(memory_rows(sizes, zero))
    assert rows["policy weights"] == rows["reference"] == 250 * 2
    assert rows["gathered weights"] == 2000 * 2  # policy and reference, if nothing bounds them
    assert rows["moving average"] == 250 * 4
    offloaded = memory_rows(sizes, zero, streamed_reference=True)
    assert by_name(offloaded, "host") == {"reference": 2000}
    assert by_name(offloaded)["gathered weights"] == 1000 * 2


def test_a_teacher_is_held_beside_the_policy_whose_reference_costs_nothing() -> None:
    sizes = replace(SIZES, frozen={"reference": 0, "teacher": 990})
    zero = Zero(stage=2, world_size=2, bucket=10, num_buckets=1)
    rows = by_name(memory_rows(sizes, zero))
    assert rows["teacher"] == 990 * 2
    assert "reference" not in rows


def test_offload_moves_states_to_where_the_config_says() -> None:
    config = {
        "stage": 3,
        "stage3_max_live_parameters": 100,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "nvme", "nvme_path": "/disk"},
    }
    zero = Zero.from_config(config, 1)
    assert (zero.optimizer, zero.weights, zero.most_gathered) == ("host", "nvme", 100)
    rows = memory_rows(SIZES, zero, encoders="host")
    assert by_name(rows, "nvme") == {"policy weights": 2000}
    assert by_name(rows, "host") == {
        "gradients": 200,
        "float32 gradients": 400,
        "AdamW, float32 weights": 1200,
        "text encoders": 50,
        "VAE, float32": 40,
    }
    assert by_name(rows)["gathered weights"] == 200  # from the disk even on a single rank


def test_a_single_rank_of_zero_3_has_its_weights_whole_already() -> None:
    zero = Zero.from_config({"stage": 3}, 1)
    assert "gathered weights" not in by_name(memory_rows(SIZES, zero))


def test_buckets_are_two_where_communication_overlaps() -> None:
    plain = Zero.from_config({"stage": 2, "overlap_comm": False}, 2)
    overlapping = Zero.from_config({"stage": 2, "overlap_comm": True}, 2)
    assert (plain.num_buckets, overlapping.num_buckets) == (1, 2)
    # A bucket is cut to the gradients there are: 100 of them, where DeepSpeed's default is 5e8.
    assert by_name(memory_rows(SIZES, plain))["reduction buckets"] == 100 * 2
