import numpy as np
import pytest
from cdpo.engine.curriculum.pairs import rank_candidates
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

SCORES = hnp.arrays(
    np.float32, st.integers(0, 40), elements=st.sampled_from([-1.5, 0.0, 0.25, 7.0, np.nan, np.inf])
)


def test_by_hand():
    ranking = rank_candidates(np.array([0.1, 0.7, np.nan, 0.7, -np.inf, 0.9], dtype=np.float32))
    assert ranking.order.tolist() == [5, 1, 3, 0]
    assert ranking.ranks.tolist() == [4, 2, 0, 3, 0, 1]
    assert ranking.dropped == 2


@given(SCORES)
def test_best_first_and_ties_by_index(scores):
    ranking = rank_candidates(scores)
    assert len(ranking.order) + ranking.dropped == len(scores)
    best_first = sorted(
        (index for index in range(len(scores)) if np.isfinite(scores[index])),
        key=lambda index: (-scores[index], index),
    )
    assert ranking.order.tolist() == best_first
    assert all(ranking.ranks[index] == rank for rank, index in enumerate(best_first, 1))


def test_a_table_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        rank_candidates(np.zeros((2, 3)))
