"""Mutations of real files, for parsers that read what strangers wrote."""

from __future__ import annotations

import os
from collections.abc import Callable

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# CDPO_FUZZ=100000 python -m pytest tests/test_fuzz.py --timeout 0: at length, with new examples.
EXAMPLES = int(os.environ.get("CDPO_FUZZ", "0"))
BLOCK = 512

JSON_TOKENS = [b"NaN", b"-1", b"1e999", b"null", b"[]", b"{}", b'""', b"0", b"true", b"1.5", b'"']
JSON_TOKENS += [b"9" * 30, b"\\ud800", b"\xff", b"\x00", b"[" * 200, b'"a":1,', b"\\u0000", b","]
YAML_TOKENS = [b"&a ", b"*a", b"!!python/object:os.system ", b"? ", b"- ", b": ", b"${oc.env:HOME}"]
YAML_TOKENS += [b"|\n", b">\n", b"'", b'"', b"\t", b"\xff", b"\x00", b"{", b"[" * 40, b"\n", b"#"]
YAML_TOKENS += [b".nan", b"1e999", b"9" * 5000, b"---\n", b"...\n", b"<<: ", b"%YAML 9.9\n", b"~"]

Edit = tuple[str, int, int, bytes]


def fuzz(examples: int) -> settings:
    """Settings of a property that is fuzzed: so many examples, or as many as CDPO_FUZZ says."""
    return settings(
        deadline=None,
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def edits(tokens: list[bytes]) -> st.SearchStrategy[list[Edit]]:
    """Some changes to a file: where (in 1/65536 of it), and what with."""
    change = st.tuples(
        st.sampled_from(["overwrite", "insert", "delete", "copy", "bit", "cut"]),
        st.integers(0, 2**16 - 1),
        st.integers(0, 2**16 - 1),
        st.one_of(st.binary(min_size=1, max_size=12), st.sampled_from(tokens or [b"\0"])),
    )
    return st.lists(change, min_size=1, max_size=5)


def apply(data: bytes, changes: list[Edit]) -> bytes:
    """``data`` with the changes made, one after another."""
    for change in changes:
        data = _ONE[change[0]](data, *change[1:]) if data else data
    return data


def mend_tar(data: bytes) -> bytes:
    """``data`` with the checksum of everything that looks like a tar header made to fit, so that
    what is behind that check is reached.
    """
    content = bytearray(data)
    for at in range(0, len(content) - BLOCK + 1, BLOCK):
        if content[at + 257 : at + 262] == b"ustar":
            blank = sum(content[at : at + BLOCK]) - sum(content[at + 148 : at + 156]) + 8 * 32
            content[at + 148 : at + 156] = b"%06o\0 " % blank
    return bytes(content)


def _at(data: bytes, place: int) -> int:
    return place * len(data) >> 16


def _bit(data: bytes, place: int, other: int, _: bytes) -> bytes:
    at = _at(data, place)
    return data[:at] + bytes([data[at] ^ 1 << other % 8]) + data[at + 1 :]


def _copy(data: bytes, place: int, other: int, payload: bytes) -> bytes:
    """A stretch of the file once more somewhere else; of whole blocks, when there are any."""
    unit = BLOCK if len(data) > 4 * BLOCK else 1
    start, to = (_at(data, spot) // unit * unit for spot in (place, other))
    return data[:to] + data[start : start + unit * len(payload)] + data[to:]


_ONE: dict[str, Callable[[bytes, int, int, bytes], bytes]] = {
    "overwrite": lambda data, place, _, payload: (
        data[: _at(data, place)] + payload + data[_at(data, place) + len(payload) :]
    ),
    "insert": lambda data, place, _, payload: (
        data[: _at(data, place)] + payload + data[_at(data, place) :]
    ),
    "delete": lambda data, place, other, _: (
        data[: _at(data, place)] + data[_at(data, place) + 1 + other % 600 :]
    ),
    "copy": _copy,
    "bit": _bit,
    "cut": lambda data, place, _, __: data[: _at(data, place)],
}
