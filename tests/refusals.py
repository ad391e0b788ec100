"""What is refused, by error, kind and key; and, for refusals that users meet most, in which words.

Wording lies in one file, tests/assets/refusals.txt, so that it is read and reworded as a whole:

    CDPO_WRITE_GOLDEN=1 python -m pytest -p no:xdist tests/engine
"""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cdpo.engine.basics.errors import CdpoError

GOLDEN = Path(__file__).parent / "assets" / "refusals.txt"
_TMP = re.compile(r"[^\s'\"]*/pytest-of-\w+/pytest-\d+/(popen-gw\d+/)?[^/\s'\"]+")


@contextmanager
def refused(
    error: type[CdpoError], kind: str, key: str | None = None, *, wording: str | None = None
) -> Iterator[pytest.ExceptionInfo[CdpoError]]:
    """The block must raise ``error`` of a kind, about ``key`` if given, in the golden words of
    the name ``wording`` if given.
    """
    with pytest.raises(error) as told:
        yield told
    found = told.value
    assert (found.kind, found.key) == (kind, found.key if key is None else key), str(found)
    if wording is not None:
        is_worded(wording, str(found))


def is_worded(name: str, text: str) -> None:
    """Hold a text against the golden file, folders of this run aside."""
    text = _TMP.sub("TMP", text)
    golden = read_golden()
    if os.environ.get("CDPO_WRITE_GOLDEN"):
        golden[name] = text
        blocks = [f"{n}\n{textwrap.indent(golden[n], '    ')}\n" for n in sorted(golden)]
        GOLDEN.write_text("\n".join(blocks), encoding="utf-8")
    assert golden.get(name) == text


def read_golden() -> dict[str, str]:
    """Wording by name."""
    if not GOLDEN.exists():
        return {}
    blocks = GOLDEN.read_text(encoding="utf-8").rstrip("\n").split("\n\n")
    parts = (block.split("\n", 1) for block in blocks)
    return {name: textwrap.dedent(text) for name, text in parts}
