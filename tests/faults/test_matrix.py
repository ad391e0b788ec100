"""docs/reliability.md promises nothing that no test runs, and every fault test is told of there."""

import ast
import re
from pathlib import Path

from launching import ROOT

TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def rows() -> list[str]:
    """The lines of the fault matrix and of the table about files of strangers."""
    text = (ROOT / "docs" / "reliability.md").read_text()
    lines = text.partition("## The fault matrix")[2].splitlines()
    return [
        line
        for line, following in zip(lines, [*lines[1:], ""], strict=True)
        if line.startswith("| ") and not following.startswith("|---")
    ]


def functions_of(path: Path) -> set[str]:
    return {
        node.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_row_names_a_test_that_exists():
    assert len(rows()) > 45
    for row in rows():
        named = TEST.findall(row)
        assert named, f"no test in the row: {row}"
        for path, name in named:
            assert name in functions_of(ROOT / path), f"{path} has no {name}"


def test_every_fault_test_is_in_the_matrix():
    named = {test for row in rows() for test in TEST.findall(row)}
    here = Path(__file__)
    for path in here.parent.glob("test_*.py"):
        if path != here:
            of_file = {(str(path.relative_to(ROOT)), name) for name in functions_of(path)}
            assert of_file <= named
