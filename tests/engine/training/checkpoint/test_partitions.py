"""What a resume refuses of DeepSpeed's files before it touches the engine, which is none here."""

from __future__ import annotations

import io
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from cdpo.engine.ranks import Ranks
from cdpo.engine.training.checkpoint import partitions
from cdpo.engine.training.checkpoint.layout import Fragment, Layout
from cdpo.engine.training.checkpoint.partitions import TAG, read_partitions
from cdpo.engine.training.checkpoint.resharding import load_data
from deepspeed.runtime.zero.config import ZeroStageEnum
from together import on_ranks

TABLE = Layout(1, {"weight": Fragment(0, 0, 0, 4)}, {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / TAG).mkdir()
    return tmp_path


def resumed(folder: Path, monkeypatch: Any, own: Layout | None, saved_ranks: int = 2) -> list[Any]:
    """What two ranks raise."""
    monkeypatch.setattr(partitions, "layout_of", lambda engine: own)

    def work(ranks: Ranks) -> object:
        return read_partitions(None, ranks, folder, saved_ranks)  # type: ignore[arg-type]

    outcomes = on_ranks(2, work)
    assert len({str(outcome) for outcome in outcomes}) == 1 and isinstance(outcomes[0], ValueError)
    return outcomes


def test_nothing_saved_is_no_fresh_start(tmp_path: Path, monkeypatch: Any) -> None:
    assert "saved nothing" in str(resumed(tmp_path, monkeypatch, TABLE)[0])


def test_an_optimiser_without_a_table_goes_on_with_as_many_ranks(folder, monkeypatch) -> None:
    """bf16 under ZeRO-1 with gradients accumulated in float32."""
    [error, _] = resumed(folder, monkeypatch, None, saved_ranks=4)
    assert str(error).startswith("4 ranks wrote it without the table") and "now there are 2" in str(
        error
    )


@pytest.mark.parametrize("saved", [True, False])
def test_another_optimiser_is_refused(folder: Path, monkeypatch: Any, saved: bool) -> None:
    if saved:
        TABLE.save(folder / TAG, 0)
    [error, _] = resumed(folder, monkeypatch, None if saved else TABLE)
    assert "under another optimiser of DeepSpeed's: keep data_types and the ZeRO stage" in str(
        error
    )


def test_a_table_that_one_rank_lacks_is_refused_by_both(folder: Path, monkeypatch: Any) -> None:
    TABLE.save(folder / TAG, 0)
    monkeypatch.setattr(partitions, "layout_of", lambda engine: TABLE)
    work = lambda ranks: read_partitions(None, ranks, folder, 2)  # noqa: E731 (as above)
    assert [type(outcome) for outcome in on_ranks(2, work)] == [FileNotFoundError] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_file_that_one_rank_cannot_read_is_refused_by_both(folder, monkeypatch, rank) -> None:
    for each in range(2):
        TABLE.save(folder / TAG, each)
    (folder / TAG / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").write_bytes(b"no tensors")
    monkeypatch.setattr(partitions, "layout_of", lambda engine: TABLE)
    work = lambda ranks: read_partitions(None, ranks, folder, 2)  # noqa: E731
    outcomes = on_ranks(2, work)
    assert len({str(outcome) for outcome in outcomes}) == 1
    assert all(isinstance(outcome, partitions.UNREADABLE) for outcome in outcomes)


def test_a_stage_of_zero_is_saved_as_data_by_any_python():
    """Python before 3.11.4 pickled a call of getattr, and no checkpoint of its could be resumed."""
    file = io.BytesIO()
    torch.save({"zero_stage": ZeroStageEnum(2)}, file)
    with zipfile.ZipFile(file) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("data.pkl")]
        codes = pickletools.genops(archive.read(name))
    called = {argument for code, argument, _ in codes if code.name == "GLOBAL"}
    assert called == {"deepspeed.runtime.zero.config ZeroStageEnum"}
    file.seek(0)
    assert load_data(file) == {"zero_stage": ZeroStageEnum(2)}
