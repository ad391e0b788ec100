"""How far each start of a run came: a run that dies at one place time and again is not restarted.

`starts.log` in the run folder is for people, too: a line for each start, one for each place it
reached, appended as it goes on, and a last one if it came to an orderly end. Where that one is
missing the process died. A checkpoint of a later step is progress: what was before it is forgotten.
Places are steps, or what is made between them, and two starts are alike if recipe, ranks, device
and code are: whoever changes something may try. Kills that come from outside fall on other places
each time, requests to stop are noted, and an error that names its own remedy (a bad shard, a full
disk) is an orderly end; so none of these counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..basics.errors import CdpoError, NumericsError, StuckError
from ..basics.versions import code_version
from ..ranks import Ranks
from ..recipe import Recipe
from .finite import advice

DEATHS = 3
START, ORDERLY = "start ", "ended in order"


@dataclass
class _Start:
    what: str
    places: list[str] = field(default_factory=list)

    @property
    def place(self) -> str | None:
        """Where it died; None if it did not, or before it came anywhere."""
        return self.places[-1] if self.places and ORDERLY not in self.places else None


class Starts:
    """The starts of one run folder. Rank 0 keeps them; any rank notes a request to stop."""

    def __init__(self, ranks: Ranks, recipe: Recipe) -> None:
        self.ranks = ranks
        self.recipe = recipe
        self.path = Path(recipe.run_dir) / "starts.log"
        self._what = _fingerprint(ranks, recipe)
        self._from = 0
        self._place = ""

    def refuse_if_stuck(self) -> None:
        """StuckError, on all ranks, if the last three starts were like this one and died at one
        place.
        """
        self.ranks.on_first(self._refuse)

    def _refuse(self) -> None:
        starts = [start for start in self._read() if ORDERLY not in start.places][-DEATHS:]
        places = {start.place for start in starts}
        if len(starts) < DEATHS or len(places) > 1 or None in places:
            return
        if any(start.what.partition(" ")[0] != self._what for start in starts):
            return
        raise StuckError(
            f"{self.recipe.run_dir} has died {DEATHS} times at {places.pop()}, each time without "
            "a later checkpoint, and would again: if memory ran out, give a smaller "
            "train.micro_batch or more ranks; if the numbers did, "
            f"{advice(self.recipe)}; or remove {self.path} to try it as it is",
            str(self.path),
            "stuck",
        )

    def _read(self) -> list[_Start]:
        found: list[_Start] = []
        with suppress(OSError):
            for line in self.path.read_text(errors="replace").splitlines():
                if line.startswith(START):
                    found.append(_Start(line.removeprefix(START)))
                elif found:
                    found[-1].places.append(line)
        return found

    @contextmanager
    def watched(self, step: int) -> Iterator[None]:
        """Within, the run goes on from ``step``; leaving it is an orderly end, or a death."""
        self._from = step
        self._add(self._line)
        self.ranks.stop.announce_by(self._asked_to_stop)
        try:
            yield
        except NumericsError:
            raise
        except (CdpoError, OSError):
            self._add(ORDERLY)
            raise
        if self.ranks.is_first:
            self.path.unlink(missing_ok=True)

    def reached(self, place: str) -> None:
        """The run has come to a place, e.g. `step 7`."""
        if place != self._place:
            self._place = place
            self._add(place)

    def committed(self, step: int) -> None:
        """There is a checkpoint of ``step``."""
        if step > self._from and self.ranks.is_first:
            self._from = step
            with suppress(OSError):
                self.path.write_text(f"{self._line}\n")

    def _asked_to_stop(self, reason: str) -> None:
        if self.path.exists():  # or the run is over
            self._append(ORDERLY)

    @property
    def _line(self) -> str:
        return f"{START}{self._what} after step {self._from}"

    def _add(self, line: str) -> None:
        if self.ranks.is_first:
            self._append(line)

    def _append(self, line: str) -> None:
        with suppress(OSError), self.path.open("a") as file:  # a full disk is told by what needs it
            file.write(line + "\n")


def _fingerprint(ranks: Ranks, recipe: Recipe) -> str:
    cuda = ranks.device.type == "cuda"
    device = torch.cuda.get_device_name(ranks.device) if cuda else ranks.device.type
    what = (recipe.model_dump_json(), ranks.world_size, device, sorted(code_version().items()))
    return hashlib.sha256(repr(what).encode()).hexdigest()[:12]
