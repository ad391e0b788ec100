"""Decoding of images beside the training step.

Pillow's WebP decoder holds Python's lock for the milliseconds that an image takes: in a thread it
would keep the training step from launching anything. So images are decoded by processes of their
own, started afresh and not forked: they hold no lock of the run, no socket of its peers and no
device. Bytes go in and pixels come out through pipes, so they end with whoever started them.
"""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from contextlib import suppress
from queue import SimpleQueue
from threading import Lock, Timer
from typing import IO

import numpy as np

from ..basics.errors import told_by
from .webp import decode_webp

REQUEST = struct.Struct("<III")  # height, width, bytes of the file, which follows
REPLY = struct.Struct("<?I")  # whether pixels follow or what is wrong; bytes of it
PIPE_BYTES = 2**20


class ImageProcesses:
    """``workers`` processes that decode WebP files; may be called from several threads at once.

    One that was killed is replaced, once an image. No wait is longer than ``timeout`` seconds.
    """

    def __init__(self, workers: int, *, timeout: float = 600.0) -> None:
        self._timeout = timeout
        self._lock = Lock()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        self._closed = False
        for _ in range(workers):
            self._idle.put(self._start())

    def __call__(self, data: bytes | memoryview, resolution: tuple[int, int]) -> np.ndarray:
        """What :func:`~.webp.decode_webp` gives or raises. ValueError also if the process died over
        the image twice, or never answered.
        """
        if self._closed:
            raise ValueError("is not decoded: the reader was closed")
        process = self._idle.get()
        try:
            for _ in range(2):
                watch = _Watch(process, self._timeout)
                try:
                    return _ask(process, data, resolution)
                except (OSError, EOFError):
                    if watch.has_ended_it:
                        raise ValueError(f"was not decoded within {self._timeout:g} s") from None
                    process = self._replace(process)
                finally:
                    watch.cancel()
        finally:
            self._idle.put(process)
        raise ValueError("the process that decoded it died twice: killed, or out of memory?")

    @property
    def process_ids(self) -> set[int]:
        """Of the processes that are there now."""
        return {process.pid for process in self._processes}

    def close(self) -> None:
        """End the processes; may be called twice."""
        with self._lock:
            self._closed = True
            for process in self._processes:
                _end(process)

    def _replace(self, dead: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
        with self._lock:
            _end(dead)
            self._processes.discard(dead)
            if self._closed:
                raise ValueError("is not decoded: the reader was closed")
            return self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        # Its own session: what is sent to the run's process group is for the run alone, which
        # goes on to the end of its step and needs what is decoded.
        process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            pipesize=PIPE_BYTES,
            start_new_session=True,
        )
        self._processes.add(process)
        return process


class _Watch(Timer):
    """Ends a process that has not answered in time."""

    def __init__(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        super().__init__(seconds, self._end)
        self.daemon = True
        self.has_ended_it = False
        self._process = process
        self.start()

    def _end(self) -> None:
        self.has_ended_it = True
        self._process.kill()


def serve() -> None:
    """Decode what comes in until nothing more does, or nobody takes what goes out."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with suppress(BrokenPipeError):
        _serve(sys.stdin.buffer, sys.stdout.buffer)
    os._exit(0)  # without another try at what was not taken


def _serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    while len(head := requests.read(REQUEST.size)) == REQUEST.size:
        height, width, size = REQUEST.unpack(head)
        try:
            pixels = decode_webp(requests.read(size), (height, width)).tobytes()
            replies.write(REPLY.pack(True, len(pixels)) + pixels)
        except ValueError as error:
            reason = told_by(error).encode()
            replies.write(REPLY.pack(False, len(reason)) + reason)
        replies.flush()


def _ask(
    process: subprocess.Popen[bytes], data: bytes | memoryview, resolution: tuple[int, int]
) -> np.ndarray:
    requests, replies = process.stdin, process.stdout
    assert requests is not None and replies is not None
    requests.write(REQUEST.pack(*resolution, len(data)))
    requests.write(data)
    requests.flush()
    decoded, size = REPLY.unpack(_read(replies, REPLY.size))
    answer = _read(replies, size)
    if not decoded:
        raise ValueError(answer.decode())
    return np.frombuffer(answer, np.uint8).reshape(*resolution, 3)


def _read(replies: IO[bytes], size: int) -> bytes:
    found = replies.read(size)
    if len(found) < size:
        raise EOFError
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with suppress(OSError):  # of what could not be sent any more
            pipe.close()
