"""Trackers that are missing, do not start or cannot write end a run with one line."""

import errno
import importlib.util
import os

import deepspeed
import pytest
import torch
from cdpo.engine.basics.errors import OutsideError
from cdpo.engine.display.terminal import Terminal
from cdpo.engine.recipe.train import Optimizer
from cdpo.engine.training.deepspeed_config import TRACKERS, refuse_missing_trackers
from cdpo.engine.training.deepspeed_engine import start_engine
from cdpo.engine.training.log import RunLog
from refusals import refused


@pytest.mark.parametrize(("section", "package"), TRACKERS.items())
def test_one_that_is_not_installed_is_named(monkeypatch, section, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refuse_missing_trackers({section: {"enabled": False}, "csv_monitor": {"enabled": True}})
    with refused(OutsideError, "not-installed", section) as told:
        refuse_missing_trackers({section: {"enabled": True}})
    assert f"pip install {package}" in str(told.value)


def test_one_that_does_not_start_is_told_and_a_defect_is_not(monkeypatch):
    failing = [type("UsageError", (Exception,), {"__module__": "wandb.errors"}), ZeroDivisionError]

    def initialize(**_):
        raise failing[0]("api_key not configured (no-tty)")

    monkeypatch.setattr(deepspeed, "initialize", initialize)
    start = [torch.nn.Linear(1, 1), {"zero_optimization": {"stage": 1}}, Optimizer()]
    with refused(OutsideError, "unsupported", "monitor") as told:
        start_engine(*start, torch.device("cpu"))
    assert "api_key not configured" in str(told.value)
    failing.pop(0)
    with pytest.raises(ZeroDivisionError):
        start_engine(*start, torch.device("cpu"))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("EventFileWriter's thread has died"),
        ConnectionError("no route to host"),
    ],
)
def test_one_that_cannot_write_leaves_the_metrics(tmp_path, error):
    def write_events(events):
        raise error

    log = RunLog(
        tmp_path,
        window=1,
        global_batch=1,
        num_timesteps=10,
        world_size=1,
        device=torch.device("cpu"),
        terminal=Terminal(),
        write_events=write_events,
    )
    with refused(OutsideError, "unwritable", "monitor"):
        log.close_step({"step": 1}, 1.0)
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
