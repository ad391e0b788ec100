"""What users read of errors: one plain line, whatever went into it."""

from __future__ import annotations

import errno
import json
import re

import pytest
import torch
import yaml
from cdpo.engine.basics.errors import (
    MOST_CHARACTERS,
    MOST_TOLD,
    CdpoError,
    DataError,
    RecipeError,
    ShardError,
    redact,
    told_by,
)
from cdpo.engine.sources.rows import load_file
from hypothesis import given
from hypothesis import strategies as st

HOSTILE = "\x1b[31mred\x1b[0m\x1b]8;;http://x\x07link\x1b]8;;\x07\nnext\r\u202egnp.exe\x9b2J\x07"


def is_plain(text: str) -> bool:
    return not re.search(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", text)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("it is\nlong"), "it is"),
        (ValueError("\n  \x1b[1mnot\x1b[0m  here. Re-run with weights_only=False"), "not here"),
        (ValueError("see e.g. Pillow 11.0 for it. Or not"), "see e.g. Pillow 11.0 for it"),
        (
            RuntimeError("Error(s) in loading:\n\tsize mismatch for a.b"),
            "Error(s) in loading: size mismatch for a.b",
        ),
        (RuntimeError(""), "RuntimeError"),
        (RuntimeError("\x1b[0m"), "RuntimeError"),
        (KeyError("unet"), "KeyError 'unet'"),
        (OSError(errno.ENOSPC, "custom", "/some/file"), "No space left on device"),
        (
            OSError("no file named a.bin found in directory b"),
            "no file named a.bin found in directory b",
        ),
    ],
)
def test_of_a_foreign_text_one_sentence_is_told(error, text):
    assert told_by(error) == text


@given(st.text(max_size=300), st.integers(1, 40))
def test_any_text_becomes_one_plain_line_of_bounded_length(text, times):
    told = told_by(ValueError(text * times))
    assert is_plain(told) and 0 < len(told) <= MOST_TOLD
    message = str(DataError(f"{text * times}: damaged", "key", "kind"))
    assert is_plain(message) and len(message) <= MOST_CHARACTERS


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("at https://u:p@h/x?sig=1#f, sorry", "at https://h/x sorry"),
        ("url='https://h/x?a=1'", "url='https://h/x'"),
        ("s3://key:a/b+c@bucket/key", "s3://bucket/key"),
        ("https://h:8080/a@b", "https://h:8080/a@b"),
        ("hf://user:hush@datasets/a/b", "hf://datasets/a/b"),
        ("hf://gpt2@main/x", "hf://gpt2@main/x"),
        ("filecache::https://hush@h/x", "filecache::https://h/x"),
        ("X-Amz-Signature=hush&a=b", "X-Amz-Signature=…&a=b"),
        ("access_token=hush, sig=hush", "access_token=… sig=…"),
        ("it was hf_" + "a1" * 15, "it was hf_…"),
        ("Bearer of-the-environment", "Bearer …"),
        (
            "reward.tokenizer=a/b data.manifest_sha256=00",
            "reward.tokenizer=a/b data.manifest_sha256=00",
        ),
        ("nothing", "nothing"),
    ],
)
def test_secrets_are_cut_out_of_whatever_is_told(text, clean, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "of-the-environment")
    assert redact(text) == clean == told_by(ValueError(text)) == str(DataError(text))


def test_megabytes_are_cut_in_the_middle():
    told = told_by(ValueError("begins " + "QUJD" * 10**6 + " ends"))
    assert told.startswith("begins QUJD") and len(told) <= MOST_TOLD
    message = str(ShardError("a.tar", "x" * 10**7 + ": too long", kind="too-large"))
    assert message.startswith("shard a.tar") and message.endswith("x: too long")
    assert len(message) <= MOST_CHARACTERS


@pytest.mark.parametrize("name", ["QUJD" * 10**6, "a\n\x1b[2Jb\u202e.png", "\x00"])
def test_a_cell_that_is_no_name_of_an_image_is_told_in_a_line(name, tmp_path):
    """Images in base64 where paths are wanted, and names that were made to hide something."""
    told = str(load_file(tmp_path / name))
    assert is_plain(told) and len(told) <= MOST_CHARACTERS and str(tmp_path) in told


def test_names_in_a_message_cannot_move_the_cursor_or_begin_a_line():
    assert str(CdpoError(f"{HOSTILE}: cannot be read")) == "redlink next gnp.exe : cannot be read"


def test_several_problems_are_a_line_each():
    assert str(RecipeError([f"a: {HOSTILE}", "b: wrong"])) == "a: redlink next gnp.exe\nb: wrong"


def test_what_libraries_really_say(tmp_path):
    """PyTorch of a pickle: half a page, in bold, on how to run it all the same."""
    path = tmp_path / "a.pth"
    torch.save({"x": json.JSONDecoder}, path)
    with pytest.raises(Exception, match="weights_only") as caught:
        torch.load(path, weights_only=True)
    assert told_by(caught.value) == "Weights only load failed"
    with pytest.raises(yaml.YAMLError) as caught:
        yaml.safe_load("a: b: c")
    assert told_by(caught.value) == "mapping values are not allowed here"
