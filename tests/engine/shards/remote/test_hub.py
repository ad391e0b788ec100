"""Shards behind hf://, by the hub's own client, from a small server that speaks as the hub does."""

import json
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import numpy as np
import pytest
from cdpo.engine.basics.errors import DataError, OutsideError
from cdpo.engine.recipe import Data, Fetch
from cdpo.engine.shards.reader import ShardReaders
from cdpo.engine.shards.remote import fetch
from cdpo.engine.shards.remote.store import RemoteStore, open_store
from cdpo.engine.shards.store import LocalStore
from refusals import refused
from shard_server import ShardHandler, ShardServer, serving

REPO, PREFIX = "owner/pairs", "made/set"
SOON = Fetch(retries=2, backoff=0.01, stall=10.0, budget=30.0, threads=0)


class _HubHandler(ShardHandler):
    """One data set; what the client asks for is in https://huggingface.co/docs/hub/api."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        about, files = f"/api/datasets/{REPO}", f"/datasets/{REPO}/resolve/main/{PREFIX}/"
        if path in (about, f"{about}/revision/main"):
            self._answer({"id": REPO, "sha": "0" * 40, "siblings": [], "tags": []})
        elif path == f"{about}/tree/main/{PREFIX}":
            self._answer([self._entry(file) for file in sorted(self.server.folder.iterdir())])
        elif path.startswith(f"{about}/tree/main/"):
            self._answer({"error": "Entry not found"}, 404, "EntryNotFound")
        elif path.startswith(files):
            assert self.headers["User-Agent"]
            self.path = path.removeprefix(files)
            super().do_GET()
        else:
            self._answer({"error": "Repository not found"}, 404, "RepoNotFound")

    def _entry(self, file: Path) -> dict[str, object]:
        name, size = f"{PREFIX}/{file.name}", file.stat().st_size
        return {"type": "file", "oid": "0" * 40, "size": size, "path": name}

    def _answer(self, value: object, status: int = 200, code: str = "") -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(body)


class Hub(ShardServer):
    """See :class:`ShardServer`; faults are those of the files."""

    handler = _HubHandler


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tier of four shards."""
    folder = tmp_path_factory.mktemp("set")
    small.write_set(folder, 2, [16], 4)
    return folder


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch):
    with serving(folder, Hub) as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        files = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield hub


def store_of(tmp_path: Path, place: str = f"hf://datasets/{REPO}/{PREFIX}") -> RemoteStore:
    store = open_store(place, Data(cache=str(tmp_path / "cache"), fetch=SOON))
    assert isinstance(store, RemoteStore)
    return store


def test_everything_is_as_in_the_folder(hub, folder, tmp_path, monkeypatch):
    """In several requests a shard, with a failure and a connection that breaks in between."""
    monkeypatch.setattr(fetch, "CHUNK", 128)
    local, store = LocalStore(folder), store_of(tmp_path)
    manifest = store.manifest()
    assert manifest == local.manifest()
    hub.faults[manifest.shards[0].name] = ["503", "drop"]
    hub.faults[manifest.shards[1].name] = ["corrupt"]
    far, near = ShardReaders(store, manifest), ShardReaders(local, manifest)
    for entry in manifest.shards:
        for index in range(entry.count):
            one, other = far.read(entry, index), near.read(entry, index)
            assert one.meta == other.meta and np.array_equal(one.images, other.images)
    assert not any(hub.faults.values())
    assert len({start for _, start in hub.requests}) > 1


def test_a_set_or_a_repository_that_is_not_there(hub, tmp_path):
    for place in (f"hf://datasets/{REPO}/elsewhere", "hf://datasets/owner/nothing/set"):
        with refused(DataError, "missing", f"{place}/manifest.json"):
            store_of(tmp_path, place).manifest()


def test_a_refusal_is_one_line_without_the_token(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_SECRET")
    hub.faults["*"] = ["403*"]
    url = f"hf://datasets/{REPO}/{PREFIX}/manifest.json"
    with refused(OutsideError, "refused", url) as told:
        store_of(tmp_path).manifest()
    line = str(told.value)
    assert line.startswith(f"{url}: ") and "403" in line
    assert "\n" not in line and "SECRET" not in line
