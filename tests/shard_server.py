"""A web server of a folder, with the faults that networks have: real sockets, in threads."""

from __future__ import annotations

import contextlib
import re
import ssl
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class ShardServer(ThreadingHTTPServer):
    """``faults[name]`` are played by the coming requests of a file, one each; a fault whose name
    ends in ``*`` by all that follow; those of ``faults["*"]`` by any file.

    Faults: a status such as ``500``, or ``503:2`` with a Retry-After of 2; ``stall`` and ``drop``,
    both after half the body; ``drip``, a byte at a time; ``corrupt``, ``short``, ``long``;
    ``redirect``, to ``redirect_to``; ``endless``, a whole body in chunks without the last one.

    With ``certificate``, a PEM file that also holds the key, it speaks https.
    """

    daemon_threads = True
    request_queue_size = 64
    handler: type[BaseHTTPRequestHandler]

    def __init__(
        self,
        folder: Path,
        *,
        ranges: bool = True,
        chunk: int = 1 << 20,
        certificate: Path | None = None,
    ) -> None:
        super().__init__(("127.0.0.1", 0), self.handler)
        self.scheme = "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)
            self.scheme = "https"
        self.folder, self.ranges, self.chunk = folder, ranges, chunk
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.redirect_to = ""
        self.requests: list[tuple[str, int]] = []
        """Name and first byte of every request."""
        self.closing = threading.Event()
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_port}"

    def count(self, name: str) -> int:
        return sum(asked == name for asked, _ in self.requests)

    def next_fault(self, name: str, start: int) -> str:
        with self._lock:
            self.requests.append((name, start))
            faults = self.faults[name] or self.faults["*"]
            if not faults:
                return "none"
            return faults[0][:-1] if faults[0].endswith("*") else faults.pop(0)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients hang up; that is what these tests are about."""


class ShardHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ShardServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(span[1]) if span and self.server.ranges else 0
        end = int(span[2]) + 1 if span and span[2] and self.server.ranges else None
        fault = self.server.next_fault(name, start)
        path = self.server.folder / name
        status, _, seconds = fault.partition(":")
        if status.isdigit():
            self._say(int(status), **({"Retry-After": seconds} if seconds else {}))
        elif not path.is_file():
            self._say(404)
        elif start >= path.stat().st_size:
            self._say(416)
        elif fault == "endless":
            self._send_endless(path.read_bytes())
        elif fault == "redirect":
            self._say(302, Location=self.server.redirect_to)
        else:
            body = memoryview(_damaged(path.read_bytes(), fault))
            self._send(body[start:end], start or end or 0, fault)

    def _say(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, body: memoryview, partial: int, fault: str) -> None:
        self.send_response(206 if partial else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        end = len(body) // 2 if fault in ("stall", "drop") else len(body)
        size = 1 if fault == "drip" else self.server.chunk
        for at in range(0, end, size):
            self.wfile.write(body[at : min(at + size, end)])
            self.wfile.flush()
            if fault == "drip" and self.server.closing.wait(0.05):
                break
        if fault == "stall":
            self.server.closing.wait(60)
        if fault == "drop":
            self.server.closing.wait(0.1)  # so that the client has read what came
        if end < len(body):
            self.close_connection = True

    def _send_endless(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"%x\r\n" % len(body) + body + b"\r\n")
        self.wfile.flush()
        self.server.closing.wait(0.1)  # so that the client has read what came
        self.close_connection = True


def _damaged(body: bytes, fault: str) -> bytes:
    if fault == "corrupt":
        middle = len(body) // 2
        return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    others = {"short": body[:-512], "long": body + bytes(512), "pointer": pointer}
    return others.get(fault, body)


ShardServer.handler = ShardHandler


@contextmanager
def serving(
    folder: Path, kind: type[ShardServer] = ShardServer, **options: object
) -> Iterator[ShardServer]:
    """A server of ``folder`` for the length of the block."""
    server = kind(folder, **options)  # type: ignore[arg-type]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        with contextlib.suppress(OSError):
            server.server_close()
        thread.join(5)
