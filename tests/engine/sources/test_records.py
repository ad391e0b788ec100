"""Which rows state a preference, and what is said of the others."""

from __future__ import annotations

from typing import Any

import pytest
from cdpo.engine.basics.errors import DataError
from cdpo.engine.recipe import Paired, Ranked
from cdpo.engine.sources.left_out import LeftOut
from cdpo.engine.sources.records import (
    CONTRADICTORY,
    HELD_OUT,
    NO_CAPTION,
    ONE_IMAGE,
    TIE,
    UNLABELLED,
    Record,
    RecordMaker,
)
from cdpo.engine.sources.rows import Row
from refusals import refused

COLUMNS = ["caption", "label_0", "image_0_uid", "image_1_uid", "best_image_uid", "has_label"]


def make(maker: RecordMaker, left_out: LeftOut | None = None, **values: Any) -> Record | None:
    defaults = {"caption": "a cat", "label_0": 1.0, "image_0_uid": "a", "image_1_uid": "b"}
    row = {**defaults, "best_image_uid": None, "has_label": True, **values}
    row = Row(0, 7, row, where="row 7")
    return maker.make(row, "x.parquet row 7", "x.parquet", left_out or LeftOut())


def paired(**changes: Any) -> RecordMaker:
    return RecordMaker(Paired(path="p", **changes), COLUMNS, {"a dog"})


@pytest.mark.parametrize(
    ("label", "winner"), [(1, 0), (1.0, 0), ("1", 0), (True, 0), (0, 1), ("0.0", 1), (False, 1)]
)
def test_a_label_says_how_the_first_image_did(label, winner):
    record = make(paired(), label_0=label)
    assert record is not None and (record.winner, record.names) == (winner, ("a", "b"))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"label_0": 0.5}, TIE),
        ({"label_0": "0.50"}, TIE),
        ({"label_0": None}, UNLABELLED),
        ({"label_0": float("nan")}, UNLABELLED),
        ({"label_0": ""}, UNLABELLED),
        ({"label_0": [1, 1]}, TIE),
        ({"label_0": [1, None]}, UNLABELLED),
        ({"has_label": False}, UNLABELLED),
        ({"has_label": "False", "label_0": "0"}, UNLABELLED),
        ({"has_label": None}, UNLABELLED),
        ({"label_0": 1, "best_image_uid": "b"}, CONTRADICTORY),
        ({"image_0_uid": "b"}, ONE_IMAGE),
        ({"image_0_uid": 7, "image_1_uid": "7"}, ONE_IMAGE),
        ({"image_0_uid": "b", "label_0": 0.5}, TIE),
        ({"caption": "A\u00a0dog."}, HELD_OUT),
        ({"caption": "\u200b"}, NO_CAPTION),
        ({"caption": ""}, NO_CAPTION),
        ({"caption": " \n"}, NO_CAPTION),
        ({"caption": None}, NO_CAPTION),
        ({"caption": "x" * 2001}, NO_CAPTION),
        ({"caption": "half a letter \ud83d"}, NO_CAPTION),
        ({"caption": " a dog "}, HELD_OUT),
    ],
)
def test_rows_without_a_preference_are_counted(values, reason):
    left_out = LeftOut()
    assert make(paired(), left_out, **values) is None
    assert left_out.rows == left_out.counts == {reason: 1}


@pytest.mark.parametrize("label", [0.7, 2, -1, float("inf"), "0.3"])
def test_another_label_is_an_error_that_names_the_row(label):
    with refused(DataError, "out-of-range", "label_0"):
        make(paired(), label_0=label)


def test_a_label_that_is_no_number():
    with refused(DataError, "wrong-type", "label_0") as caught:
        make(paired(), label_0="left")
    assert str(caught.value).startswith("x.parquet row 7: ")


@pytest.mark.parametrize("judged", [True, 1, 1.0, "true", "True", "1"])
def test_a_row_that_was_judged(judged):
    assert make(paired(), has_label=judged)
    assert make(paired(has_label=None), has_label=False)


def test_whether_a_row_was_judged_is_true_or_false():
    with refused(DataError, "wrong-type", "has_label"):
        make(paired(), has_label="maybe")


def test_best_image_is_looked_at_only_where_it_says_something():
    assert make(paired(), best_image_uid="a") and make(paired(), best_image_uid="tie")
    assert make(paired(best_image=None), best_image_uid="b")


def test_optional_columns_are_read_where_they_are():
    assert paired().columns == [*COLUMNS[:2], "has_label", "best_image_uid", *COLUMNS[2:4]]
    assert RecordMaker(Paired(path="p"), ["caption", "label_0"], ()).columns == COLUMNS[:2]
    with_scores = Paired(path="p", label=None, scores=("s", "t"))
    assert RecordMaker(with_scores, ["caption"], ()).columns == ["caption", "s", "t"]


@pytest.mark.parametrize(
    ("label", "winner"), [([1, 0], 0), ([0.0, 1.0], 1), (["3", "2"], 0), ([-1, 0], 1)]
)
def test_a_label_may_be_a_list_with_a_number_for_each_image(label, winner):
    record = make(paired(), label_0=label)
    assert record is not None and record.winner == winner


def test_scores_of_which_the_lower_one_is_better():
    """So that the higher one wins, and the gap is as large as it was."""
    names = ["a", "b"]
    spec = Paired(path="p", label=None, scores=("rank_a", "rank_b"), order="lower")
    maker = RecordMaker(spec, ["caption"], ())
    values = {"caption": "x", "rank_a": 1, "rank_b": "3"}
    record = maker.make(Row(0, 0, values, tuple(names)), "", "", LeftOut())
    assert record is not None and record.scores == (-1, -3)


def test_ids_that_a_record_has_no_room_for_still_name_two_images():
    """Of 300 characters, the last of which differs: the places in the data name them then."""
    long = {"image_0_uid": "u" * 300 + "0", "image_1_uid": "u" * 300 + "1"}
    record = make(paired(), **long)
    assert record is not None and record.names == ()
    record = make(paired(), **long | {"image_0_uid": "v" * 300})
    assert record is not None and record.names == ("v" * 256, "u" * 256)


def test_one_path_on_both_sides_is_no_preference():
    maker, left_out = RecordMaker(Paired(path="p", label=None), ["caption"], ()), LeftOut()
    assert maker.make(Row(0, 0, {"caption": "x"}, ("a.png",) * 2), "", "", left_out) is None
    assert left_out.counts == {ONE_IMAGE: 1}


def test_given_scores():
    maker = RecordMaker(Ranked(path="p"), ["caption", "score"], ())
    rows = [Row(0, 0, {"caption": "x", "score": score}, ("a.png",)) for score in ("1.5", None)]
    record, empty = (maker.make(row, "", "", LeftOut()) for row in rows)
    assert record is not None and (record.scores, record.names) == ((1.5,), ("a.png",))
    assert empty is not None and empty.scores[0] != empty.scores[0]
    with refused(DataError, "wrong-type", "score"):
        maker.make(Row(0, 3, {"caption": "x", "score": "good"}), "t.csv row 3", "t.csv", LeftOut())
