"""Prompt files: what counts as a prompt, and what is wrong with a file, in one line."""

from pathlib import Path

import pytest
from cdpo.engine.errors import DataError
from cdpo.engine.prompts import MAX_PROMPT_CHARACTERS, read_prompts
from cdpo.engine.recipe import Prompts


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def read_train(folder: Path, content: str | bytes, limit: int | None = None) -> list[str]:
    train, heldout = read_prompts(Prompts(train=write(folder, "train.txt", content), limit=limit))
    assert heldout == []
    return train


def test_a_line_is_a_prompt(tmp_path):
    content = "# animals\na dog\n\n   a cat  \n\t\n  # not a prompt\na dog\na #1 fan"
    assert read_train(tmp_path, content) == ["a dog", "a cat", "a #1 fan"]


def test_files_of_other_systems(tmp_path):
    """Line ends of Windows, and the byte order mark that its editors put in front."""
    assert read_train(tmp_path, b"\xef\xbb\xbfa dog\r\na caf\xc3\xa9\r\n") == ["a dog", "a café"]
    assert read_train(tmp_path, b"\xef\xbb\xbf# comment\na dog") == ["a dog"]


def test_limit_takes_the_first_distinct_ones_of_each_file(tmp_path):
    assert read_train(tmp_path, "b\nb\na\nc\n", limit=2) == ["b", "a"]
    assert read_train(tmp_path, "b\na", limit=9) == ["b", "a"]
    spec = Prompts(
        train=write(tmp_path, "t", "a\nb"), heldout=write(tmp_path, "h", "c\nd"), limit=1
    )
    assert read_prompts(spec) == (["a"], ["c"])


def test_held_out_prompts_are_not_trained_on(tmp_path):
    spec = Prompts(
        train=write(tmp_path, "t", "a dog\na cat\na cow"),
        heldout=write(tmp_path, "h", "a cow \na pig\na cat"),
    )
    with pytest.raises(DataError) as caught:
        read_prompts(spec)
    assert f"prompts.heldout={spec.heldout} shares 2 prompts with {spec.train}" in str(caught.value)
    assert "'a cat'" in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n \n", "# only\n# comments"])
def test_a_file_without_prompts(tmp_path, content):
    with pytest.raises(DataError, match=r"train\.txt holds no prompt"):
        read_train(tmp_path, content)


def test_a_file_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "absent.txt", tmp_path):
        with pytest.raises(DataError, match=f"prompts: {path} cannot be read: "):
            read_prompts(Prompts(train=str(path)))


def test_a_file_that_is_not_text(tmp_path):
    with pytest.raises(DataError, match=r"train\.txt is not UTF-8 text \(byte 6\)"):
        read_train(tmp_path, b"a dog\n\xff\xfe")


def test_a_prompt_that_is_too_long_is_named_by_its_line(tmp_path):
    longest = "x" * MAX_PROMPT_CHARACTERS
    assert read_train(tmp_path, f"a\n{longest}\n# {longest}") == ["a", longest]
    with pytest.raises(DataError, match=r"train\.txt:2 has 2001 characters; at most 2000"):
        read_train(tmp_path, f"a\n{longest}y")
