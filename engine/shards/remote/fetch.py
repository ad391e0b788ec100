"""Files behind a URL, brought whole or with one clear error: every wait is bounded.

fsspec knows the services; what it leaves open is decided here. Each of its calls runs in a thread
of its own, so that whatever a library waits for, nobody waits for it longer than ``stall`` seconds
without a byte. Failures that may pass are retried from where the last attempt broke off, after
waits that double, until ``retries`` in a row bring nothing or the ``budget`` of seconds is spent.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, InvalidStateError, wait
from contextlib import suppress
from functools import lru_cache, partial
from io import BytesIO
from threading import Thread
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from ...basics.errors import DataError, OutsideError, RecipeError, redact, told_by
from ...recipe import Fetch
from ...recipe.reading import WITHOUT_SECRETS
from .faults import (
    BEYOND_THE_END,
    NOT_THERE,
    InsecureRedirectError,
    asked_to_wait,
    may_pass,
    not_connected,
    reason_of,
    status_of,
)

CHUNK = 2**20
MAX_BACKOFF = 30.0
SECONDS_TO_BE_HEARD = 3.0  # of a service that this process has never reached

# What serves a scheme beyond our own dependencies: (import, how to get it).
SCHEMES: dict[str, tuple[str, str]] = {
    "http": ("aiohttp", "pip install aiohttp"),
    "https": ("aiohttp", "pip install aiohttp"),
    "s3": ("s3fs", "pip install 'cdpo[s3]'"),
    "hf": ("huggingface_hub", "pip install huggingface_hub"),
}


class Arrival:
    """A file on its way: counted, hashed and written to ``file``, up to ``size`` bytes of it.

    It ``resumes`` where an attempt broke off only if a checksum then tells whether both parts are
    of the same file.
    """

    def __init__(self, file: BinaryIO, size: int, *, resumes: bool) -> None:
        self.size, self.resumes, self._file = size, resumes, file
        self.restart()

    def restart(self) -> None:
        """Forget what has arrived."""
        self._file.seek(0)
        self.arrived = 0
        self._sha256 = hashlib.sha256()

    def write(self, data: bytes) -> None:
        """Append; what is beyond the size is counted, which ends the transfer, and not kept."""
        if self.arrived + len(data) <= self.size:
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]
            self._sha256.update(data)
        self.arrived += len(data)

    @property
    def sha256(self) -> str:
        """Of what has arrived."""
        return self._sha256.hexdigest()


class _Failed(Exception):
    """A call of the service's library failed: no fault of this side."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


def is_remote(location: str) -> bool:
    """Whether a location is a URL and not a folder."""
    return "://" in location and not location.startswith("file://")


class RemoteFolder:
    """The files below one URL. Safe to use from several threads, and after a fork."""

    def __init__(self, url: str, spec: Fetch) -> None:
        """Raises RecipeError for a URL that is not taken, OutsideError for a missing package."""
        self.url, self._spec = _checked(url), spec
        self._scheme = scheme = urlsplit(url).scheme
        self._stopped: Future[None] = Future()
        self._reached = False
        # Each folder has a client of its own in each process: libraries keep connections in it.
        self._client_of = lru_cache(lambda process: _client(scheme, spec.budget))
        try:
            self._client_of(os.getpid())
        except ImportError:
            package, remedy = SCHEMES[self._scheme]
            raise OutsideError(
                f"data.path={self.url}: {self._scheme}:// needs the package {package}, which is "
                f"not installed: {remedy}",
                package,
                "not-installed",
            ) from None

    def name_of(self, name: str) -> str:
        """The URL of a file."""
        return f"{self.url}/{name}"

    def stop(self) -> None:
        """End what is on its way: transfers and waits raise OutsideError at once."""
        with suppress(InvalidStateError):  # stopped before
            self._stopped.set_result(None)

    def bring(self, name: str, arrival: Arrival, deadline: float = math.inf) -> None:
        """Bring a file; ``arrival`` ends shorter or at its full size where the file does.

        Within ``data.fetch.budget``, and before ``deadline`` on the monotonic clock. A service to
        which no connection was ever made is given up after :data:`SECONDS_TO_BE_HEARD`: without a
        network nobody is to wait for one.

        Raises:
            FileNotFoundError: the service says that there is no such file.
            OutsideError: refused, or not brought within retries and budget.
        """
        url = self.name_of(name)
        began = time.monotonic()
        deadline = min(deadline, began + self._spec.budget)
        failures = furthest = 0
        while True:
            try:
                return self._attempt(url, arrival, deadline)
            except _Failed as failed:
                error = failed.error
            reason, status = reason_of(error), status_of(error)
            if isinstance(error, FileNotFoundError) or status == NOT_THERE:
                raise FileNotFoundError(name)
            self._reached |= not not_connected(error)
            if not self._reached:
                reason += "; is there a network?"
            if status == BEYOND_THE_END and arrival.arrived:
                arrival.restart()
            elif not may_pass(error):
                raise OutsideError(f"{url}: {reason}", url, "refused")
            failures = 1 if arrival.arrived > furthest else failures + 1
            furthest = max(furthest, arrival.arrived)
            pause = asked_to_wait(error) + self._pause(failures)
            if not self._reached and time.monotonic() + pause > began + SECONDS_TO_BE_HEARD:
                raise OutsideError(f"{url}: {reason}", url, "unreachable")
            if failures > self._spec.retries or pause >= deadline - time.monotonic():
                spent = "retries" if failures > self._spec.retries else "budget"
                raise OutsideError(
                    f"{url}: {reason}; given up after {failures} failures in a row "
                    f"(data.fetch.{spent})",
                    url,
                    "timeout" if isinstance(error, TimeoutError) else "unreachable",
                )
            if wait([self._stopped], pause).done:
                raise self._stopped_error()

    def _pause(self, failures: int) -> float:
        """Exponential back-off with jitter, so that ranks do not come back all at once."""
        longest = min(MAX_BACKOFF, self._spec.backoff * 2.0 ** (failures - 1))
        return longest * random.SystemRandom().uniform(0.5, 1.0)

    def _attempt(self, url: str, arrival: Arrival, deadline: float) -> None:
        if not arrival.resumes:
            arrival.restart()
        opening = partial(self._open, url, arrival.arrived)
        file, start = self._within(opening, deadline)
        with file:  # closing it ends a read that nobody waits for any more
            if start != arrival.arrived:  # the service began at the start
                arrival.restart()
            reading = partial(file.read, CHUNK)
            self._reached = True
            while arrival.arrived <= arrival.size and (data := self._within(reading, deadline)):
                arrival.write(data)

    def _within(self, call: Callable[[], Any], deadline: float) -> Any:
        """What ``call`` gives, from a thread that is left alone when it takes too long."""
        answer: Future[Any] = Future()

        def run() -> None:
            try:
                answer.set_result(call())
            except BaseException as error:
                answer.set_exception(error)

        Thread(target=run, name="shard-fetch", daemon=True).start()
        stall, left = self._spec.stall, deadline - time.monotonic()
        wait([answer, self._stopped], min(stall, left), FIRST_COMPLETED)
        if self._stopped.done():
            raise self._stopped_error()
        if not answer.done():
            budget = f"not here within {self._spec.budget:g} s"
            raise _Failed(TimeoutError(budget if left < stall else f"no byte for {stall:g} s"))
        if error := answer.exception():
            raise _Failed(error)
        return answer.result()

    def _stopped_error(self) -> OutsideError:
        return OutsideError(f"{self.url}: stopped", self.url, "stopped")

    def _open(self, url: str, offset: int) -> tuple[Any, int]:
        """The file from ``offset`` on, or from 0 where the service cannot do better."""
        client = self._client_of(os.getpid())
        if self._scheme in ("http", "https"):
            # Without a block size the answer to one request is streamed; its length is not asked
            # for beforehand if one is given, and not believed.
            headers = {"Accept-Encoding": "identity"}
            if offset:
                headers["Range"] = f"bytes={offset}-"
            file = client.open(url, "rb", block_size=0, size=1, headers=headers)
            return file, offset if file.r.status == 206 else 0
        file = client.open(url, "rb", block_size=8 * CHUNK, cache_type="readahead")
        file.seek(offset)
        return file, offset


def _checked(url: str) -> str:
    """The URL without its closing slash; RecipeError, without its secrets, if it is not taken."""
    shown = redact(url)
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise _refusal(f"{shown} is no URL: {told_by(error)}", "wrong-type") from None
    if parts.scheme not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise _refusal(f"{shown}: shards are read from a folder or from {known}", "unsupported")
    if not parts.netloc:
        raise _refusal(f"{shown}: names no host or bucket", "missing")
    if parts.query or parts.fragment or (parts.scheme != "hf" and "@" in parts.netloc):
        raise _refusal(
            f"{shown}: {WITHOUT_SECRETS}",
            "secret",
        )
    return url.rstrip("/")


def _refusal(what: str, kind: str) -> RecipeError:
    return RecipeError(f"data.path={what}", "data.path", kind)


def _client(scheme: str, budget: float) -> Any:
    """Fsspec's file system. Requests that nobody waits for any more end with the budget."""
    import fsspec

    options: dict[str, Any] = {"skip_instance_cache": True}
    if scheme in ("http", "https"):
        import aiohttp

        secure = aiohttp.TraceConfig()
        secure.on_request_redirect.append(_refuse_downgrade)
        options["client_kwargs"] = {
            "timeout": aiohttp.ClientTimeout(total=budget),
            "trust_env": True,  # proxies and ~/.netrc
            "read_bufsize": CHUNK,
            "trace_configs": [secure],
        }
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


def bring_text(folder: RemoteFolder, name: str, max_bytes: int) -> bytes:
    """A small file that nothing vouches for; DataError where there is none, or where it is larger
    than ``max_bytes``.
    """
    content = BytesIO()
    text = Arrival(content, max_bytes, resumes=False)
    try:
        folder.bring(name, text)
    except FileNotFoundError:
        what = f"no shards at {folder.url} ({name} is not there)"
        raise DataError(what, folder.name_of(name), "missing") from None
    if text.arrived > max_bytes:
        what = f"{folder.name_of(name)}: over {max_bytes} bytes, that is none of ours"
        raise DataError(what, folder.name_of(name), "too-large")
    return content.getvalue()[: text.arrived]
