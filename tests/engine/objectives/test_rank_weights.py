"""Weights by ranks against what a swap changes of the discounted gain of a whole list."""

import math
from itertools import combinations

import pytest
from cdpo.engine.objectives import rank_weights


def discounted_gain(gains: list[float]) -> float:
    return sum(gain / math.log2(place + 1) for place, gain in enumerate(gains, start=1))


@pytest.mark.parametrize("candidates", [2, 3, 12])
def test_a_weight_is_the_change_of_discounted_gain_when_two_ranks_are_swapped(candidates):
    found = rank_weights(candidates).double()
    # Of each image, how many of the others it is preferred to.
    beaten = [candidates - rank for rank in range(1, candidates + 1)]
    gains = [2 ** (count / (candidates - 1)) - 1 for count in beaten]
    changes = {}
    for winner, loser in combinations(range(candidates), 2):
        swapped = list(gains)
        swapped[winner], swapped[loser] = gains[loser], gains[winner]
        changes[winner + 1, loser + 1] = discounted_gain(gains) - discounted_gain(swapped)
    mean = sum(changes.values()) / len(changes)
    for ranks, change in changes.items():
        assert found[ranks].item() == pytest.approx(change / mean, rel=1e-6)
        assert found[ranks] == found[ranks[::-1]]
    assert sum(found[ranks].item() for ranks in changes) / len(changes) == pytest.approx(1)
