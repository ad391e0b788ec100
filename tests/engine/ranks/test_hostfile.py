"""What docs/cluster.md says of a hostfile that names this machine alone, asked of DeepSpeed."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from base64 import urlsafe_b64decode
from pathlib import Path
from typing import Any

import pytest
from deepspeed.launcher import runner

CLUSTER = Path(__file__).parents[3] / "docs" / "cluster.md"


def test_a_hostfile_of_this_machine_alone_starts_its_ranks_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    monkeypatch.chdir(tmp_path)
    found = re.search(
        r"deepspeed (--hostfile hosts --no_ssh_check.*?)\n```", CLUSTER.read_text(), re.S
    )
    assert found
    started: list[list[str]] = []

    class Started:
        returncode = 0

        def __init__(self, command: list[str], **_: Any) -> None:
            started.append(command)

        def wait(self) -> None:
            pass

    def refuse(*command: Any, **_: Any) -> None:
        raise AssertionError(f"it starts {command}")

    monkeypatch.setattr(subprocess, "Popen", Started)
    monkeypatch.setattr(subprocess, "check_call", refuse)
    monkeypatch.setattr(subprocess, "check_output", refuse)
    monkeypatch.setattr(runner.signal, "signal", lambda *_: None)
    runner.main(shlex.split(found[1].replace("\\\n", " ")))
    (command,) = started
    assert command[:4] == [sys.executable, "-u", "-m", "deepspeed.launcher.launch"]
    (world,) = [word.partition("=")[2] for word in command if word.startswith("--world_info=")]
    assert json.loads(urlsafe_b64decode(world)) == {"localhost": [0, 1]}
    assert "--master_addr=127.0.0.1" in command
