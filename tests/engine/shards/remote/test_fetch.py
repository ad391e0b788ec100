"""Bringing files over real sockets: what passes is retried, what does not is one line in time."""

import math
import random
import ssl
import subprocess
import sys
import threading
import time
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import fsspec
import pytest
from cdpo.engine.basics.errors import EXIT_OUTSIDE, DataError, OutsideError, RecipeError
from cdpo.engine.recipe import Fetch
from cdpo.engine.shards.remote import fetch
from cdpo.engine.shards.remote.faults import asked_to_wait
from cdpo.engine.shards.remote.fetch import Arrival, RemoteFolder, bring_text, is_remote
from fsspec.implementations.memory import MemoryFile
from multidict import CIMultiDict
from refusals import refused
from shard_server import ShardServer, serving

CONTENT = random.Random(0).randbytes(10_240)  # no half of it is like the other
SOON = Fetch(retries=3, backoff=0.01, stall=10.0, budget=30.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    (folder / "a.tar").write_bytes(CONTENT)
    return folder


@pytest.fixture
def web(folder: Path):
    with serving(folder, chunk=1024) as web:
        yield web


def arrival(size: int) -> Arrival:
    return Arrival(BytesIO(), size, resumes=False)


def bring(web: ShardServer, **spec: float) -> bytes:
    content = BytesIO()
    shard = Arrival(content, len(CONTENT), resumes=True)  # as shards are
    RemoteFolder(web.url, SOON.model_copy(update=spec)).bring("a.tar", shard)
    return content.getvalue()


def fails(web: ShardServer, kind: str, text: str = "", **spec: float) -> float:
    """One line with the URL and this number or name, exit code 6; how long that took."""
    began = time.monotonic()
    with refused(OutsideError, kind, f"{web.url}/a.tar") as told:
        bring(web, **spec)
    assert told.value.exit_code == EXIT_OUTSIDE
    line = str(told.value)
    assert "\n" not in line and line.startswith(f"{web.url}/a.tar: ") and text in line
    return time.monotonic() - began


@pytest.mark.parametrize("fault", ["none", "500", "503", "429", "408", "drop"])
def test_what_passes_is_retried(web, fault):
    web.faults["a.tar"] = [fault, fault]
    assert bring(web) == CONTENT


def test_a_dropped_connection_is_taken_up_where_it_broke_off(web):
    web.faults["a.tar"] = ["drop", "drop", "drop", "drop"]
    assert bring(web) == CONTENT
    starts = [start for _, start in web.requests]
    assert starts[0] == 0 < starts[-1] and starts == sorted(starts) and len(starts) == 5


def test_a_server_without_ranges_begins_again(folder):
    with serving(folder, ranges=False) as web:
        web.faults["a.tar"] = ["drop", "drop"]
        assert bring(web) == CONTENT
        assert [start for _, start in web.requests] == [0, 0, 0]


def test_a_stalled_connection_is_given_up_and_tried_again(web):
    web.faults["a.tar"] = ["stall"]
    began = time.monotonic()
    assert bring(web, stall=0.5) == CONTENT
    assert 0.5 <= time.monotonic() - began < 15


def test_a_server_that_stalls_forever(web):
    web.faults["a.tar"] = ["stall*"]
    fails(web, "timeout", "data.fetch.retries", stall=0.1, retries=1)
    deadline = time.monotonic() + 5  # what nobody waits for any more has ended
    while any(thread.name == "shard-fetch" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_endless_drip_ends_with_the_budget(web):
    web.faults["a.tar"] = ["drip*"]
    assert fails(web, "timeout", "data.fetch.budget", budget=1.0) < 15


def test_errors_forever_are_counted(web):
    web.faults["a.tar"] = ["500*"]
    fails(web, "unreachable", "500")
    assert web.count("a.tar") == 4


@pytest.mark.parametrize("status", ["401", "403", "410"])
def test_a_refusal_is_not_retried(web, status):
    web.faults["a.tar"] = [f"{status}*"]
    fails(web, "refused", status)
    assert web.count("a.tar") == 1


def test_a_missing_file_is_told_apart(web):
    web.faults["a.tar"] = ["404*"]
    with pytest.raises(FileNotFoundError):
        bring(web)
    with refused(DataError, "missing", f"{web.url}/x"):
        bring_text(RemoteFolder(web.url, SOON), "x", 100)


def test_nobody_listens(folder):
    with serving(folder) as web:
        pass
    fails(web, "unreachable", retries=1)


@pytest.mark.parametrize("target", ["file:///etc/passwd", "gopher://127.0.0.1/x"])
def test_a_redirect_leads_to_the_web_only(web, target):
    web.faults["a.tar"], web.redirect_to = ["redirect*"], target
    fails(web, "refused")
    assert web.count("a.tar") == 1


@pytest.fixture
def https(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The folder by https, from a host whose certificate is made here and trusted here."""
    pem = tmp_path / "host.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 "
    command += f"-subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1 -keyout {pem} -out {pem}.c"
    try:
        subprocess.run(command.split(), check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    certificate = (tmp_path / "host.pem.c").read_bytes()
    pem.write_bytes(pem.read_bytes() + certificate)
    trusting = ssl.create_default_context(cadata=certificate.decode())
    monkeypatch.setattr(aiohttp.connector, "_SSL_CONTEXT_VERIFIED", trusting)
    with serving(folder, certificate=pem) as web:
        yield web


@pytest.mark.parametrize("relative", [False, True])
def test_a_redirect_from_https_stays_with_https(web, https, relative):
    """Where anybody on the way could change what comes, and the manifest with it."""
    assert bring(https) == CONTENT
    https.faults["a.tar"] = ["redirect*"]
    https.redirect_to = f"//127.0.0.1:{https.server_port}/b.tar"
    (https.folder / "b.tar").write_bytes(CONTENT)
    if relative:
        assert bring(https) == CONTENT
        return
    https.redirect_to = f"{web.url}/a.tar?X-Amz-Signature=SECRET"
    fails(https, "refused", f"{web.url}/a.tar")
    assert web.count("a.tar") == 0 and https.count("a.tar") == 2


def test_a_redirect_from_http_to_https_is_followed(web, https):
    web.faults["a.tar"], web.redirect_to = ["redirect"], f"{https.url}/a.tar"
    assert bring(web) == CONTENT


@pytest.mark.parametrize("status", ["429", "503"])
def test_a_service_that_asks_to_wait_is_not_asked_sooner(web, status):
    web.faults["a.tar"] = [f"{status}:1"]
    began = time.monotonic()
    assert bring(web) == CONTENT
    assert 1.0 <= time.monotonic() - began < 15


def test_a_wait_longer_than_the_budget_is_not_begun(web):
    web.faults["a.tar"] = ["503:3600"]
    assert fails(web, "unreachable", "3600") < 15
    assert web.count("a.tar") == 1


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7.0),
        ({"retry-after": " 2.5 "}, 2.5),
        (
            {
                "Date": "Wed, 21 Oct 2015 07:28:00 GMT",
                "Retry-After": "Wed, 21 Oct 2015 07:28:30 GMT",
            },
            30.0,
        ),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:30 GMT"}, 0.0),
        ({"Retry-After": "soon"}, 0.0),
        ({"Retry-After": "-5"}, 0.0),
        ({"Retry-After": "nan"}, 0.0),
        ({"Retry-After": "9" * 400}, math.inf),
        ({}, 0.0),
    ],
)
def test_how_long_a_service_asks_to_wait(headers, seconds):
    error = OSError()
    error.response = SimpleNamespace(headers=CIMultiDict(headers))  # type: ignore[attr-defined]
    assert asked_to_wait(error) == seconds
    assert asked_to_wait(OSError()) == 0.0


def test_a_whole_file_without_an_end_is_fetched_once_more(web):
    """All bytes came and the connection broke: there is nothing from there on to ask for."""
    web.faults["a.tar"] = ["endless"]
    assert bring(web) == CONTENT


def test_a_manifest_is_not_pieced_together(web):
    """No checksum says whether both halves are of one: half of another would go unnoticed."""
    web.faults["a.tar"] = ["drop", "drop"]
    assert bring_text(RemoteFolder(web.url, SOON), "a.tar", len(CONTENT)) == CONTENT
    assert [start for _, start in web.requests] == [0, 0, 0]


def test_secrets_of_a_redirect_are_not_shown(web):
    with serving(web.folder) as other:
        other.faults["*"] = ["403*"]
        web.faults["a.tar"] = ["redirect*"]
        web.redirect_to = f"{other.url}/a.tar?X-Amz-Signature=SECRET"
        with refused(OutsideError, "refused") as told:
            bring(web)
    assert "SECRET" not in str(told.value)


def test_a_small_file_is_bounded(web):
    assert bring_text(RemoteFolder(web.url, SOON), "a.tar", len(CONTENT)) == CONTENT
    with refused(DataError, "too-large", f"{web.url}/a.tar"):
        bring_text(RemoteFolder(web.url, SOON), "a.tar", 5000)


@pytest.mark.parametrize("fault", ["500*", "stall*"])
def test_stopping_ends_waits_and_stalled_transfers(web, fault):
    web.faults["a.tar"] = [fault]
    folder = RemoteFolder(web.url, SOON.model_copy(update={"backoff": 20.0, "stall": 30.0}))
    threading.Timer(0.2, folder.stop).start()
    began = time.monotonic()
    with refused(OutsideError, "stopped"):
        folder.bring("a.tar", arrival(10**6))
    assert time.monotonic() - began < 5


def test_a_fault_of_this_side_is_not_one_of_the_network(web):
    class Full(BytesIO):
        def write(self, data: object) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        RemoteFolder(web.url, SOON).bring("a.tar", Arrival(Full(), len(CONTENT), resumes=True))
    assert web.count("a.tar") == 1


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("https://user:SECRET@host/set", "secret"),
        ("https://host/set?token=SECRET", "secret"),
        ("https://host/set#SECRET", "secret"),
        ("s3://key:SECRET@bucket/set", "secret"),
        ("ftp://host/set", "unsupported"),
        ("simplecache::s3://bucket/set", "unsupported"),
        ("https:///set", "missing"),
        ("https://[host/set", "wrong-type"),
    ],
)
def test_urls_that_are_not_taken(url, kind):
    assert is_remote(url)
    documented = {
        "https://host/set?token=SECRET": "url-with-secret",
        "ftp://host/set": "url-of-ftp",
    }
    with refused(RecipeError, kind, "data.path", wording=documented.get(url)) as told:
        RemoteFolder(url, SOON)
    assert "SECRET" not in str(told.value)


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with refused(OutsideError, "not-installed", "s3fs", wording="without-s3fs"):
        RemoteFolder("s3://bucket/set", SOON)


def test_other_services_go_through_fsspec(monkeypatch):
    """The path of s3:// and hf://, on fsspec's file system in memory, with a failure half-way."""
    fsspec.filesystem("memory").pipe_file("/bucket/set/a.tar", CONTENT)
    monkeypatch.setitem(fetch.SCHEMES, "memory", ("fsspec", ""))
    monkeypatch.setattr(fetch, "CHUNK", 1024)
    starts: list[int] = []

    def read(file: MemoryFile, size: int) -> bytes:
        if file.tell() == 2048 and not starts:
            starts.append(file.tell())
            raise ConnectionResetError
        if len(starts) == 1:
            starts.append(file.tell())
        return BytesIO.read(file, size)

    monkeypatch.setattr(MemoryFile, "read", read, raising=False)
    folder, content = RemoteFolder("memory://bucket/set/", SOON), BytesIO()
    folder.bring("a.tar", Arrival(content, len(CONTENT), resumes=True))
    assert content.getvalue() == CONTENT
    assert starts[0] == 2048 >= starts[1] > 0
    with pytest.raises(FileNotFoundError):
        folder.bring("b.tar", arrival(10))
