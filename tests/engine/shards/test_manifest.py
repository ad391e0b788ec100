import json
import tracemalloc

import pytest
from cdpo.engine.basics.errors import DataError
from cdpo.engine.shards.manifest import load_manifest, manifest_hash, save_manifest
from refusals import refused


@pytest.fixture
def saved(small, tmp_path):
    """A folder with a sound manifest, and a function that writes a changed copy of it."""
    save_manifest(tmp_path, small.paper(2, {1: (2, 5), 2: (4, 3)}))
    path = tmp_path / "manifest.json"

    def change(edit):
        data = json.loads(path.read_text())
        edit(data)
        path.write_text(json.dumps(data))
        return tmp_path

    return change


def refuse(folder, kind: str, key: str | None = None) -> None:
    """About the manifest as a whole, unless ``key`` is a place in it."""
    path = str(folder / "manifest.json")
    with refused(DataError, kind, key or path) as told:
        load_manifest(folder)
    assert "\n" not in str(told.value) and str(folder) in str(told.value)


def test_what_is_saved_is_loaded(small, tmp_path):
    manifest = small.paper(2, {1: (2, 5), 2: (4, 3)})
    save_manifest(tmp_path, manifest)
    loaded = load_manifest(tmp_path)
    assert loaded == manifest
    assert loaded.num_pairs == 22
    assert manifest_hash(loaded) == manifest_hash(manifest)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_the_hash_is_of_the_content(small, tmp_path):
    manifest = small.paper(2, {1: (2, 5)})
    path = save_manifest(tmp_path, manifest)
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert manifest_hash(load_manifest(tmp_path)) == manifest_hash(manifest)
    other = manifest.model_copy(update={"seed": 4})
    assert manifest_hash(other) != manifest_hash(manifest)


def test_nothing_there(tmp_path):
    refuse(tmp_path / "absent", "missing")
    refuse(tmp_path, "missing")


@pytest.mark.parametrize("text", ["", "{", "\x00\xff", "[" * 100_000, '{"a": 1, "a": 2}', "[1, 2]"])
def test_not_a_manifest(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    refuse(tmp_path, "unsupported" if text == "[1, 2]" else "damaged")


def test_a_folder_in_its_place(tmp_path):
    (tmp_path / "manifest.json").mkdir()
    refuse(tmp_path, "unreadable")


@pytest.mark.parametrize(
    ("edit", "place"),
    [
        (lambda m: m.update(format_version=2), None),
        (lambda m: m.pop("format_version"), None),
        (lambda m: m.pop("vae"), "vae"),
        (lambda m: m.update(extra=1), "extra"),
        (lambda m: m.update(lanes=0), "lanes"),
        (lambda m: m.update(lanes="2"), "lanes"),
        (lambda m: m.update(lanes=3), ""),
        (lambda m: m.update(tiers=3), ""),
        (lambda m: m.update(tiers=1), ""),
        (lambda m: m["shards"].pop(), ""),
        (lambda m: m["shards"][5].update(count=4), ""),
        (lambda m: m["shards"][1].update(name="tier-1-000000.tar"), ""),
        (lambda m: m["shards"][1].update(name="../x.tar"), "shards.1.name"),
        (lambda m: m["shards"][1].update(name="/x.tar"), "shards.1.name"),
        (lambda m: m["shards"][1].update(name="x.tar.gz"), "shards.1.name"),
        (lambda m: m["shards"][1].update(name="pipe:cat x.tar"), "shards.1.name"),
        (lambda m: m["shards"][1].update(name="x.tar\n"), "shards.1.name"),
        (lambda m: m["shards"][1].update(sha256="abc"), "shards.1.sha256"),
        (lambda m: m["shards"][1].update(count=0), "shards.1.count"),
        (lambda m: m["latent_shape"].append(1), "latent_shape"),
        # A pair of a terabyte, and numbers that no 64 bits hold: room was made for them unread.
        (lambda m: m.update(latent_shape=[4, 100_000, 1_000_000]), ""),
        (lambda m: m.update(latent_shape=[1, 10**30, 1]), "latent_shape.1"),
        (lambda m: m.update(resolution=[10**6, 10**6], kind="raw"), ""),
        (lambda m: [e.update(count=10**30) for e in m["shards"]], "shards.0.count"),
        (lambda m: m["shards"][0].update(bytes=10**30), "shards.0.bytes"),
    ],
)
def test_what_is_wrong_is_named(saved, edit, place):
    refuse(saved(edit), "unsupported" if place is None else "damaged", place)


def test_reading_a_small_manifest_takes_little_memory(small, tmp_path):
    """Found by fuzzing: the bound on its size was asked of the system at every reading."""
    save_manifest(tmp_path, small.paper(2, {1: (2, 5)}))
    tracemalloc.start()
    load_manifest(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
