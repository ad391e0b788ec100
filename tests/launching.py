"""Starting verbs as processes: fast ones through a fork server, real ones through the launcher."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny

ROOT = Path(__file__).resolve().parent.parent
VERBS = ("prepare", "train", "compare")
DOCUMENTED = {0, 2, 3, 4, 5, 6, 7}  # exit codes that are no defect and no signal
KILLED = -9
# A logit is beta/2 times a difference of predictions, so the rounding of two networks (1e-7 of
# predictions around 1, here of random weights) enters the loss multiplied by beta/2; and Adam turns
# the rounding of a gradient of 1e-8 into a whole step. With these two out of the way curves are
# comparable at the 1e-5 that is promised.
CALM = ("objective.beta=500", "train.optimizer.eps=1e-6")


# More pairs a batch than the world's tiers have, and too few steps for the last of them.
PAIRS_REPEAT = ("train.global_batch=64", "train.micro_batch=32", "train.steps=4")


@dataclass(frozen=True)
class Outcome:
    """How a verb ended on each rank."""

    codes: list[int]
    output: list[str]

    @property
    def code(self) -> int:
        return self.codes[0]

    @property
    def text(self) -> str:
        return "\n".join(self.output)

    def succeeded(self) -> Outcome:
        assert set(self.codes) == {0}, self.text
        return self

    def told(self) -> Outcome:
        """It went well, or ended with one line and a code of the docs."""
        assert self.code in DOCUMENTED and "Traceback" not in self.text, self.text
        errors = [line for line in self.text.splitlines() if line.startswith("error:")]
        assert len(errors) == (self.code != 0), self.text
        return self

    def refused(self, code: int, *texts: str) -> None:
        """All ranks left with ``code``, the first with one clear line that holds all the texts."""
        assert set(self.codes) == {code}, self.text
        assert "Traceback" not in self.text
        errors = [line for line in self.output[0].splitlines() if line.startswith("error:")]
        assert len(errors) == 1, self.text
        assert [text for text in texts if text not in errors[0]] == [], errors[0]


def told_of_repeats(outcome: Outcome) -> None:
    """What a verb says ahead of a run with the knobs of PAIRS_REPEAT."""
    counts = re.findall(r"stage 1 has (\d+) pairs for train.global_batch=64: some", outcome.text)
    assert len(counts) == 1 and int(counts[0]) < 64, outcome.text
    assert "come up in a batch twice" in outcome.text
    assert "stages 3 never open" in outcome.text


class ForkServer:
    """See tests/workers/forkserver.py. Processes that name the same folder share what the first of
    them starts; ``env`` is for what libraries read at their import.
    """

    def __init__(self, folder: Path, env: Mapping[str, str] | None = None) -> None:
        name = f"cdpo-{hashlib.sha256(str(folder).encode()).hexdigest()}"
        self._process: subprocess.Popen[str] | None = None
        self._socket = socket.socket(socket.AF_UNIX)
        with alone(folder / "forkserver.lock"):
            try:
                self._socket.connect(f"\0{name}")
            except ConnectionRefusedError:
                self._process = start_server(name, env or {})
                self._socket.connect(f"\0{name}")
        self._verbs = self._socket.makefile("rw")
        self._cache = os.environ["XDG_CACHE_HOME"]  # the starter's may be gone before we are

    def run(
        self,
        verb: str | Path,
        recipe: Path,
        overrides: Sequence[str] = (),
        *,
        ranks: int = 1,
        env: Mapping[str, str] | None = None,
        seconds: float = 120,
    ) -> Outcome:
        """Run a verb, or a script that is called like one."""
        script = verb if isinstance(verb, Path) else ROOT / "engine" / f"{verb}.py"
        request = {
            "script": str(script),
            "args": ["--recipe", str(recipe), *overrides],
            "env": {"XDG_CACHE_HOME": self._cache, **(env or {})},
            "ranks": ranks,
            "seconds": seconds,
        }
        print(json.dumps(request), file=self._verbs, flush=True)
        answer = self._verbs.readline()
        assert answer, "the fork server died before it said how the verb ended"
        return Outcome(**json.loads(answer))

    def close(self) -> None:
        self._verbs.close()
        self._socket.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def start_server(name: str, env: Mapping[str, str]) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "workers" / "forkserver.py"), name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CDPO_FAILPOINT": ""} | dict(env),
    )
    assert process.stdout is not None
    assert process.stdout.readline(), "the fork server died before it was ready"
    return process


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time; ``path`` is the lock's file."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def once(folder: Path, make: Callable[[Path], object]) -> Path:
    """The folder, made by the first of several processes that ask for it."""
    with alone(folder.with_name(f"{folder.name}.lock")):
        if not (made := folder.with_name(f"{folder.name}.made")).exists():
            make(folder)
            made.touch()
    return folder


@dataclass(frozen=True)
class World:
    """A tiny world on disk with its shards made: what training tests start from."""

    folder: Path
    recipe: Path
    server: ForkServer

    @property
    def shards(self) -> Path:
        return self.folder / "run" / "shards"

    def train(
        self,
        run: Path,
        *overrides: str,
        ranks: int = 1,
        failpoint: str = "",
        zero: int = 2,
        seconds: float = 120,
        script: str | Path = "train",
        env: Mapping[str, str] | None = None,
    ) -> Outcome:
        """Train on the world's shards in a run folder of its own; ``script`` may be another that
        does so.
        """
        config = zero_config(self.folder / f"zero{zero}.json", zero)
        mine = [f"run_dir={run}", f"data.path={self.shards}", f"deepspeed={config}"]
        env = {"CDPO_FAILPOINT": failpoint, **(env or {})}
        return self.server.run(
            script, self.recipe, [*mine, *overrides], ranks=ranks, env=env, seconds=seconds
        )


def zero_config(path: Path, stage: int, **of_three: int) -> Path:
    """A DeepSpeed configuration; ``of_three`` are further keys of stage 3, e.g. one that divides
    small parameters too, which it keeps whole by itself.
    """
    section: dict[str, int] = {"stage": stage}
    if stage == 3:
        # At each layer DeepSpeed looks this many weights ahead for what to keep: by default through
        # all of a tiny network, each time, which takes twenty times as long as the step.
        section |= {"stage3_max_reuse_distance": 1000, **of_three}
    return once(path, lambda path: path.write_text(json.dumps({"zero_optimization": section})))


def make_world(
    folder: Path, server: ForkServer, *, backbone: str = "sd", ranks: int = 1, **changes: Any
) -> World:
    recipe = tiny.build(folder, backbone)
    for dotted, value in changes.items():
        section, _, key = dotted.rpartition("__")
        (recipe[section] if section else recipe)[key] = value
    path = tiny.write_recipe(folder / "recipe.yaml", recipe)
    server.run("prepare", path, ranks=ranks).succeeded()
    return World(folder, path, server)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]
