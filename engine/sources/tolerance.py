"""How many rows with unreadable images are left out before that is an error."""

from __future__ import annotations

from collections.abc import Iterable

from ..basics.errors import DataError


class Tolerance:
    """Counts rows whose images cannot be read, as ``prepare.source.max_unreadable`` allows."""

    def __init__(self, most: int, problems: Iterable[str] = ()) -> None:
        self.most = most
        self.problems = list(problems)

    def note(self, problem: str) -> None:
        """Leave a row out; raises DataError with the first one's problem if they are too many."""
        self.problems.append(problem)
        if len(self.problems) <= self.most:
            return
        if self.most:
            remedy = f"the first of over prepare.source.max_unreadable={self.most} such rows"
        else:
            remedy = "prepare.source.max_unreadable=N leaves out up to N such rows"
        raise DataError(f"{self.problems[0]} ({remedy})")

    def copy(self) -> Tolerance:
        """For one rank's share of a pass: what all ranks met is noted after it."""
        return Tolerance(self.most, self.problems)
