"""Files behind a URL, brought whole or with one clear error: every wait is bounded.

fsspec knows the services; what it leaves open is decided here. An attempt runs in a thread of its
own, so that whatever a library waits for, nobody waits for it longer than ``stall`` seconds without
a byte. Failures that may pass are retried from where the last attempt broke off, after waits that
double, until ``retries`` in a row bring nothing or the ``budget`` of seconds is spent.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Iterator
from contextlib import suppress
from queue import Empty, Full, Queue
from threading import Event, Lock, Thread
from typing import Any, Protocol
from urllib.parse import urlsplit

from ...basics.errors import CdpoError, DataError, OutsideError, RecipeError
from ...recipe import Fetch
from .faults import (
    BEYOND_THE_END,
    NOT_THERE,
    InsecureRedirectError,
    asked_to_wait,
    may_pass,
    reason_of,
    redact,
    status_of,
)

CHUNK = 2**20
MAX_BACKOFF = 30.0

# What serves a scheme beyond our own dependencies: (import, how to get it).
SCHEMES: dict[str, tuple[str, str]] = {
    "http": ("aiohttp", "pip install aiohttp"),
    "https": ("aiohttp", "pip install aiohttp"),
    "s3": ("s3fs", "pip install 'cdpo[s3]'"),
    "hf": ("huggingface_hub", "pip install huggingface_hub"),
}
LOOK_EVERY = 0.25  # seconds between two looks at whether to stop


class Target(Protocol):
    """What a file is brought into. Nothing further is brought once it has more than its size."""

    resumes: bool
    """Whether it is taken up where an attempt broke off: only if a checksum then tells whether both
    parts are of the same file."""

    @property
    def arrived(self) -> int:
        """Bytes so far."""

    @property
    def size(self) -> int:
        """Bytes it takes."""

    def write(self, data: bytes) -> None:
        """Append."""

    def restart(self) -> None:
        """Forget what has arrived."""


class _TargetFailed(Exception):
    """The fault of this side: not to be taken for one of the connection."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.error = error


def is_remote(location: str) -> bool:
    """Whether a location is a URL and not a folder."""
    return "://" in location and not location.startswith("file://")


class RemoteFolder:
    """The files below one URL. Safe to use from several threads, and after a fork."""

    def __init__(self, url: str, spec: Fetch) -> None:
        """Raises RecipeError for a URL that is not taken, OutsideError for a missing package."""
        self.url = _checked(url)
        self._scheme = urlsplit(url).scheme
        self._spec = spec
        self._stopped = Event()
        self._lock = Lock()
        self._filesystem: tuple[int, Any] | None = None  # of the process that made it
        self._jitter = random.Random()
        try:
            self._fs()
        except ImportError:
            package, remedy = SCHEMES[self._scheme]
            raise OutsideError(
                f"data.path={self.url}: {self._scheme}:// needs the package {package}, which is "
                f"not installed: {remedy}"
            ) from None

    def name_of(self, name: str) -> str:
        """The URL of a file."""
        return f"{self.url}/{name}"

    def stop(self) -> None:
        """End what is on its way: transfers and waits raise OutsideError soon."""
        self._stopped.set()

    def bring(self, name: str, target: Target, deadline: float = math.inf) -> None:
        """Fill ``target`` with a file; it ends shorter or at its full size where the file does.

        Within ``data.fetch.budget``, and before ``deadline`` on the monotonic clock.

        Raises:
            FileNotFoundError: the service says that there is no such file.
            OutsideError: refused, or not brought within retries and budget.
        """
        deadline = min(deadline, time.monotonic() + self._spec.budget)
        failures = furthest = 0
        while True:
            try:
                self._attempt(name, target, deadline)
                return
            except _TargetFailed as failure:
                raise failure.error from None
            except (CdpoError, FileNotFoundError):
                raise
            except Exception as error:
                reason, asked = reason_of(error), asked_to_wait(error)
                if status_of(error) == NOT_THERE:
                    raise FileNotFoundError(name) from None
                if status_of(error) == BEYOND_THE_END and target.arrived:
                    target.restart()
                elif not may_pass(error):
                    raise OutsideError(f"{self.name_of(name)}: {reason}") from None
            failures = 1 if target.arrived > furthest else failures + 1
            furthest = max(furthest, target.arrived)
            pause = asked + self._pause(failures)
            left = deadline - time.monotonic()
            if failures > self._spec.retries or pause >= left:
                spent = "retries" if failures > self._spec.retries else "budget"
                raise OutsideError(
                    f"{self.name_of(name)}: {reason}; given up after {failures} failures in a row "
                    f"(data.fetch.{spent})"
                )
            if self._stopped.wait(pause):
                raise OutsideError(f"{self.name_of(name)}: stopped")

    def _pause(self, failures: int) -> float:
        """Exponential back-off with jitter, so that ranks do not come back all at once."""
        longest = min(MAX_BACKOFF, self._spec.backoff * 2.0 ** (failures - 1))
        return longest * self._jitter.uniform(0.5, 1.0)

    def _attempt(self, name: str, target: Target, deadline: float) -> None:
        if not target.resumes:
            target.restart()
        abandoned = Event()
        arriving: Queue[bytes | int | BaseException] = Queue(maxsize=2)
        args = (self.name_of(name), target.arrived, arriving, abandoned)
        Thread(target=self._pump, args=args, name="shard-fetch", daemon=True).start()
        try:
            for item in self._arrivals(arriving, deadline):
                if isinstance(item, int):
                    if item != target.arrived:  # the service began at the start
                        target.restart()
                    continue
                try:
                    target.write(item)
                except OSError as error:
                    raise _TargetFailed(error) from None
                if target.arrived > target.size:
                    return
        finally:
            abandoned.set()

    def _arrivals(
        self, arriving: Queue[bytes | int | BaseException], deadline: float
    ) -> Iterator[bytes | int]:
        """What the pump puts, as long as it keeps coming."""
        while True:
            item = self._next_item(arriving, deadline)
            if isinstance(item, BaseException):
                raise item
            if item == b"":
                return
            yield item

    def _next_item(
        self, arriving: Queue[bytes | int | BaseException], deadline: float
    ) -> bytes | int | BaseException:
        stalls_at = time.monotonic() + self._spec.stall
        while True:
            if self._stopped.is_set():
                raise OutsideError(f"{self.url}: stopped")
            patience = min(stalls_at, deadline) - time.monotonic()
            with suppress(Empty):
                return arriving.get(timeout=max(0.0, min(patience, LOOK_EVERY)))
            if patience <= 0 and deadline < stalls_at:
                raise TimeoutError(f"not here within {self._spec.budget:g} s")
            if patience <= 0:
                raise TimeoutError(f"no byte for {self._spec.stall:g} s")

    def _pump(
        self,
        url: str,
        offset: int,
        arriving: Queue[bytes | int | BaseException],
        abandoned: Event,
    ) -> None:
        """Put where the service begins, then chunks, then b"" or what went wrong."""

        def put(item: bytes | int | BaseException) -> None:
            while not abandoned.is_set():
                with suppress(Full):
                    arriving.put(item, timeout=0.1)
                    return

        try:
            file, start = self._open(url, offset)
            with file:
                put(start)
                while not abandoned.is_set():
                    chunk = file.read(CHUNK)
                    put(bytes(chunk))
                    if not chunk:
                        return
        except BaseException as error:
            put(error)

    def _open(self, url: str, offset: int) -> tuple[Any, int]:
        """The file from ``offset`` on, or from 0 where the service cannot do better."""
        filesystem = self._fs()
        if self._scheme in ("http", "https"):
            # Without a block size the answer to one request is streamed; its length is not asked
            # for beforehand if one is given, and not believed.
            headers = {"Accept-Encoding": "identity"}
            if offset:
                headers["Range"] = f"bytes={offset}-"
            file = filesystem.open(url, "rb", block_size=0, size=1, headers=headers)
            return file, offset if file.r.status == 206 else 0
        file = filesystem.open(url, "rb", block_size=8 * CHUNK, cache_type="readahead")
        file.seek(offset)
        return file, offset

    def _fs(self) -> Any:
        with self._lock:
            if self._filesystem is None or self._filesystem[0] != os.getpid():
                self._filesystem = (os.getpid(), _filesystem(self._scheme, self._spec.stall))
            return self._filesystem[1]


def _checked(url: str) -> str:
    """The URL without its closing slash; RecipeError, without its secrets, if it is not taken."""
    shown = redact(url)
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise RecipeError(f"data.path={shown} is no URL: {error}") from None
    if parts.scheme not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise RecipeError(f"data.path={shown}: shards are read from a folder or from {known}")
    if not parts.netloc:
        raise RecipeError(f"data.path={shown}: names no host or bucket")
    if parts.query or parts.fragment or (parts.scheme != "hf" and "@" in parts.netloc):
        raise RecipeError(
            f"data.path={shown}: without user, password or query string, please, which would end "
            "up in the run folder; credentials come from the environment (AWS_*, HF_TOKEN) or "
            "~/.netrc"
        )
    return url.rstrip("/")


def _filesystem(scheme: str, stall: float) -> Any:
    """Fsspec's client. Each process and folder has one: libraries keep connections in it."""
    import fsspec

    options: dict[str, Any] = {"skip_instance_cache": True}
    if scheme in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=2 * stall, sock_read=2 * stall)
        secure = aiohttp.TraceConfig()
        secure.on_request_redirect.append(_refuse_downgrade)
        options["client_kwargs"] = {
            "timeout": timeout,
            "trust_env": True,  # proxies and ~/.netrc
            "read_bufsize": CHUNK,
            "trace_configs": [secure],
        }
    if scheme == "s3":
        options["config_kwargs"] = {"connect_timeout": 2 * stall, "read_timeout": 2 * stall}
    return fsspec.filesystem(scheme, **options)


async def _refuse_downgrade(session: Any, context: Any, redirect: Any) -> None:
    """Raise before anything is asked for in the clear that was to come by https."""
    from yarl import URL

    answer = redirect.response
    target = answer.headers.get("Location") or answer.headers.get("URI") or ""
    with suppress(ValueError):  # aiohttp itself refuses what is no URL
        there = answer.url.join(URL(target))
        if answer.url.scheme == "https" and there.scheme == "http":
            answer.close()
            raise InsecureRedirectError(str(there))


class Text:
    """A target in memory, for a small file that nothing vouches for."""

    resumes = False

    def __init__(self, size: int) -> None:
        self.size = size
        self.content = bytearray()

    @property
    def arrived(self) -> int:
        """Bytes so far."""
        return len(self.content)

    def write(self, data: bytes) -> None:
        """Append."""
        self.content += data

    def restart(self) -> None:
        """Forget what has arrived."""
        self.content.clear()


def bring_text(folder: RemoteFolder, name: str, max_bytes: int) -> bytes:
    """A small file; DataError where there is none, or where it is larger than ``max_bytes``."""
    text = Text(max_bytes)
    try:
        folder.bring(name, text)
    except FileNotFoundError:
        raise DataError(f"no shards at {folder.url} ({name} is not there)") from None
    if text.arrived > max_bytes:
        raise DataError(f"{folder.name_of(name)}: over {max_bytes} bytes, that is none of ours")
    return bytes(text.content)
