"""The helper that all refusals are asserted with."""

from __future__ import annotations

import pickle

import pytest
from cdpo.engine.basics.errors import CheckpointError, DataError, ShardError
from refusals import is_worded, read_golden, refused


def test_another_error_kind_or_key_fails():
    def tell(*arguments: str) -> None:
        raise DataError("no rows in a.csv", *arguments)

    with refused(DataError, "empty", "a.csv"):
        tell("a.csv", "empty")
    with pytest.raises(AssertionError), refused(DataError, "missing", "a.csv"):
        tell("a.csv", "empty")
    with pytest.raises(AssertionError), refused(DataError, "empty", "b.csv"):
        tell("a.csv", "empty")
    with pytest.raises(DataError), refused(CheckpointError, "empty"):
        tell("a.csv", "empty")


def test_wording_that_nobody_recorded_fails(monkeypatch):
    monkeypatch.delenv("CDPO_WRITE_GOLDEN", raising=False)
    with pytest.raises(AssertionError):
        is_worded("no such name", "text")
    name, text = next(iter(read_golden().items()))
    is_worded(name, text)
    with pytest.raises(AssertionError):
        is_worded(name, text + "!")


@pytest.mark.parametrize(
    "error",
    [DataError("text", "key", "kind"), ShardError("a.tar", "reason", "key", "member", "kind")],
)
def test_an_error_travels_between_processes_whole(error):
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert str(again) == str(error) and vars(again) == vars(error)
