"""Embeddings of prompts beside shards: what is written is read, and what is wrong is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cdpo.engine.basics.errors import DataError
from cdpo.engine.preparing.shard_tools.check import check_set
from cdpo.engine.shards import prompts as module
from cdpo.engine.shards.manifest import StoredText, load_manifest, manifest_hash, save_manifest
from cdpo.engine.shards.prompts import PromptFiles, Row, stored_in, write_prompts
from cdpo.engine.shards.store import LocalStore
from refusals import refused
from safetensors.torch import load_file

# Texts of lengths of their own, and pooled ones; a prompt may be anything.
ROWS: dict[str, Row] = {
    prompt: (torch.randn(1 + len(prompt), 3).bfloat16(), torch.randn(2).bfloat16())
    for prompt in ("", "a fox", "a" * 5000, "ein Füchslein 🦊\n")
}
SIZES = [(None, 3), (2,)]


@pytest.fixture
def folder(small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A set with stored prompts in several files."""
    small.write_set(tmp_path, 2, [12, 8], 3)
    monkeypatch.setattr(module, "FILE_BYTES", 30)
    files = write_prompts(tmp_path, "prompts-00000", ROWS.items())
    assert len(files) > 1
    text = StoredText(fingerprint="f" * 64, precision="bf16", files=tuple(files))
    manifest = load_manifest(tmp_path)
    save_manifest(tmp_path, manifest.model_copy(update={"text": text}))
    assert manifest_hash(load_manifest(tmp_path)) == manifest_hash(manifest)
    opened(tmp_path).hold_to(SIZES)
    return tmp_path


def opened(folder: Path) -> PromptFiles:
    manifest, store = load_manifest(folder), LocalStore(folder)
    return PromptFiles(store, stored_in(manifest, store, "bf16"))


def test_what_is_written_is_read(folder: Path) -> None:
    found = opened(folder)
    for prompt, row in ROWS.items():
        assert prompt in found
        ours = found.row(prompt)
        assert [value.dtype for value in ours] == [value.dtype for value in row]
        assert all(map(torch.equal, ours, row))
    stored = [name for path in folder.glob("*.safetensors") for name in load_file(path)]
    assert len(stored) == len(set(stored)) == 2 * len(ROWS)


def test_a_prompt_that_is_not_there_is_named(folder: Path) -> None:
    found = opened(folder)
    assert "a dog" not in found
    with refused(DataError, "missing", "data.text") as told:
        found.row("a dog")
    assert "'a dog'" in str(told.value) and str(folder) in str(told.value)


def test_another_precision_and_a_set_without_prompts_are_refused(folder: Path) -> None:
    manifest, store = load_manifest(folder), LocalStore(folder)
    with refused(DataError, "mismatch", "train.precision"):
        stored_in(manifest, store, "fp32")
    with refused(DataError, "missing", "data.text"):
        stored_in(manifest.model_copy(update={"text": None}), store, "bf16")


@pytest.mark.parametrize("kind", ["missing", "truncated", "damaged"])
def test_a_file_that_is_wrong_is_named(folder: Path, kind: str) -> None:
    path = sorted(folder.glob("*.safetensors"))[-1]
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] + (b"" if kind == "truncated" else b"\x77"))
    with refused(DataError, kind) as told:
        opened(folder)
    assert str(path) in str(told.value)
    report = check_set(folder, load_manifest(folder))
    assert len(report.problems) == 1 and str(path) in report.problems[0]


Change = Callable[[Row], Row]
# What right sums may hold, the kind it is refused with, and whether the sizes alone tell.
WRONG: dict[str, tuple[Change, str, bool]] = {
    "rank": (lambda row: (row[0][0], row[1]), "mismatch", True),
    "width": (lambda row: (row[0][:, :2], row[1]), "mismatch", True),
    "no tokens": (lambda row: (row[0][:0], row[1]), "mismatch", True),
    "pooled width": (lambda row: (row[0], row[1][:1]), "mismatch", True),
    "a tensor less": (lambda row: row[:1], "mismatch", True),
    "a tensor more": (lambda row: (*row, row[1].clone()), "mismatch", True),
    "float32": (lambda row: (row[0].float(), row[1]), "mismatch", False),
    "integers": (lambda row: (row[0].to(torch.int64), row[1]), "mismatch", False),
    "NaN": (lambda row: (row[0], row[1] * torch.nan), "non-finite", False),
    "infinity": (lambda row: (row[0].fill_(torch.inf), row[1]), "non-finite", False),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_no_encoder_made_is_named_whatever_its_sum(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one prompt among others that are right."""
    monkeypatch.setattr(module, "FILE_BYTES", 1)  # a file for each
    change, kind, by_size = WRONG[name]
    rows = {prompt: tuple(map(torch.clone, row)) for prompt, row in ROWS.items()}
    rows["a fox"] = change(rows["a fox"])
    files = write_prompts(folder, "prompts-00001", rows.items())
    manifest = load_manifest(folder)
    text = StoredText(fingerprint="f" * 64, precision="bf16", files=tuple(files))
    save_manifest(folder, manifest.model_copy(update={"text": text}))
    path = str(folder / files[1].name)
    with refused(DataError, kind, path):
        opened(folder).hold_to(SIZES)
    problems = check_set(folder, load_manifest(folder)).problems
    assert [path in problem for problem in problems] == ([] if by_size else [True])


def test_texts_of_one_length_have_it(folder: Path) -> None:
    with refused(DataError, "mismatch"):
        opened(folder).hold_to([(6, 3), (2,)])
