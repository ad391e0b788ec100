"""Every fail-point is in the list, and every name in the list is a place in the code."""

import re
from pathlib import Path

import pytest
from cdpo.engine.basics import failpoints

ROOT = Path(__file__).resolve().parents[3]


def test_the_list_is_the_code():
    placed = {
        name
        for path in (ROOT / "engine").rglob("*.py")
        if path.name != "failpoints.py"
        for name in re.findall(r'failpoint\("([^"]+)"\)', path.read_text())
    }
    assert placed == set(failpoints.NAMES)


def test_every_fail_point_is_exercised():
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name in failpoints.NAMES if name not in tests] == []


def test_passages_and_ranks(monkeypatch):
    def passages(wanted: str, rank: str = "0") -> list[str | None]:
        failpoints._passages.clear()
        monkeypatch.setenv("CDPO_FAILPOINT", wanted)
        monkeypatch.setenv("RANK", rank)
        return [failpoints.failpoint("train.loss") for _ in range(3)]

    assert passages("train.loss:nan") == ["nan"] * 3
    assert passages("train.loss@2:nan") == [None, "nan", None]
    assert passages("train.loss@2+:nan") == [None, "nan", "nan"]
    assert passages("train.step:nan") == [None] * 3
    assert passages("train.loss:nan/rank1") == [None] * 3
    assert passages("train.loss:nan/rank1", rank="1") == ["nan"] * 3
    with pytest.raises(OSError, match="No space left"):
        passages("train.loss:enospc")
    with pytest.raises(ValueError, match="write it as"):
        passages("train.lost:nan")
