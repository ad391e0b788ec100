import pytest
from cdpo.engine.curriculum.pacing import Cursor, Pacing, stage_tiers
from cdpo.engine.recipe import Curriculum
from hypothesis import given
from hypothesis import strategies as st


def pacing(total=100, **curriculum) -> Pacing:
    return Pacing(Curriculum(**{"tiers": 3, "steps_per_tier": 10} | curriculum), total)


@pytest.mark.parametrize(
    ("order", "cumulative", "expected"),
    [
        ("easy_to_hard", True, [(1,), (1, 2), (1, 2, 3)]),
        ("easy_to_hard", False, [(1,), (2,), (3,)]),
        ("hard_to_easy", True, [(3,), (2, 3), (1, 2, 3)]),
        ("hard_to_easy", False, [(3,), (2,), (1,)]),
        ("random", True, [(1, 2, 3)]),
        ("random", False, [(1, 2, 3)]),
    ],
)
def test_stages_of_every_order(order, cumulative, expected):
    curriculum = Curriculum(tiers=3, order=order, cumulative=cumulative)
    assert stage_tiers(curriculum) == expected


def test_the_last_stage_takes_the_rest():
    stages = pacing().stages
    assert [(stage.first_step, stage.num_steps) for stage in stages] == [
        (0, 10),
        (10, 10),
        (20, 80),
    ]
    assert pacing().stage_at(9).index == 0
    assert pacing().stage_at(10).index == 1
    assert pacing().stage_at(99).index == 2
    assert pacing().unreached == ()


def test_a_short_run_names_the_tiers_it_never_reaches():
    short = pacing(total=15)
    assert [stage.num_steps for stage in short.stages] == [10, 5, 0]
    assert [stage.index for stage in short.unreached] == [2]


def test_stages_whose_pairs_do_not_fill_a_batch_are_named():
    found = pacing().crowded({1: 10, 2: 20, 3: 100}, batch=32)
    assert {stage.tiers: pairs for stage, pairs in found.items()} == {(1,): 10, (1, 2): 30}
    assert pacing().crowded({1: 10, 2: 20, 3: 100}, batch=10) == {}
    one_at_a_time = pacing(total=15, cumulative=False).crowded({1: 40, 2: 20, 3: 10}, batch=32)
    assert [stage.index for stage in one_at_a_time] == [1]  # the last is never reached


@given(
    st.integers(1, 7),
    st.integers(1, 12),
    st.integers(1, 120),
    st.sampled_from(["easy_to_hard", "hard_to_easy", "random"]),
    st.booleans(),
)
def test_stages_tile_the_run(tiers, steps_per_tier, total, order, cumulative):
    curriculum = Curriculum(
        tiers=tiers, steps_per_tier=steps_per_tier, order=order, cumulative=cumulative
    )
    paced = Pacing(curriculum, total)
    assert sum(stage.num_steps for stage in paced.stages) == total
    for step in range(total):
        stage = paced.stage_at(step)
        assert stage.first_step <= step < stage.first_step + stage.num_steps


def one_pass_in_four_batches(stage, num_batches):
    return -(-num_batches // 4)


def test_positions_and_visits_by_hand():
    """Ten batches of stage 0 begin three passes of four batches, so stage 1 visits from 3 on."""
    paced = pacing()
    first, last = (paced.position(step, (0, 0, 0), one_pass_in_four_batches) for step in (0, 9))
    assert (first.stage.index, first.batch, first.visit_base) == (0, 0, 0)
    assert (last.stage.index, last.batch, last.visit_base) == (0, 9, 0)
    second = paced.position(10, (0, 0, 0), one_pass_in_four_batches)
    assert (second.stage.index, second.batch, second.visit_base) == (1, 0, 3)
    third = paced.position(25, (0, 0, 0), one_pass_in_four_batches)
    assert (third.stage.index, third.batch, third.visit_base) == (2, 5, 6)


def test_a_skip_draws_the_next_batch_and_advances_nothing_else():
    paced, cursor = pacing(), Cursor(9, (0, 0, 0))
    skipped = cursor.skipped(paced)
    assert skipped == Cursor(9, (1, 0, 0))
    again = paced.position(skipped.step, skipped.skips, one_pass_in_four_batches)
    assert (again.stage.index, again.batch) == (0, 10)
    after = skipped.advanced()
    opened = paced.position(after.step, after.skips, one_pass_in_four_batches)
    assert (opened.stage.index, opened.batch) == (1, 0)
    many = paced.position(10, (3, 0, 0), one_pass_in_four_batches)
    assert many.visit_base == 4  # thirteen batches began a fourth pass


@given(st.lists(st.booleans(), max_size=60))
def test_no_batch_of_a_stage_is_offered_twice(steps_taken):
    """Whatever is skipped, positions inside a stage count up by one, and stages follow the step."""
    paced = pacing(total=40, steps_per_tier=5)
    cursor = Cursor.start(paced)
    offered = []
    for taken in steps_taken:
        if cursor.step == 40:
            break
        position = paced.position(cursor.step, cursor.skips, one_pass_in_four_batches)
        assert position.stage == paced.stage_at(cursor.step)
        offered.append((position.stage.index, position.batch))
        cursor = cursor.advanced() if taken else cursor.skipped(paced)
    assert offered == sorted(set(offered))
    for index in range(3):
        batches = [batch for stage, batch in offered if stage == index]
        assert batches == list(range(len(batches)))


def test_refusals():
    with pytest.raises(ValueError, match="3 stages"):
        pacing().position(0, (0,), one_pass_in_four_batches)
    with pytest.raises(ValueError, match="step=-1"):
        pacing().stage_at(-1)
    with pytest.raises(ValueError, match="total_steps=0"):
        pacing(total=0)
