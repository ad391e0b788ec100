import io

import numpy as np
import webdataset
from cdpo.engine.basics.errors import ShardError
from cdpo.engine.preparing import candidate_files
from cdpo.engine.preparing.candidate_files import (
    candidates_path,
    has_candidates,
    image_id,
    read_candidates,
    write_candidates,
)
from PIL import Image
from refusals import refused

META = {"seed": 1, "model": "abc", "sampler": {"steps": 15, "guidance": 3.0}, "size": (8, 12)}


def pictures(count: int = 3) -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 12, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def test_candidates_come_back_to_the_last_bit(tmp_path):
    path = write_candidates(tmp_path, "a dog", pictures(), META)
    found = read_candidates(tmp_path, "a dog", META)
    for image, written in zip(found, pictures(), strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(written))
    assert has_candidates(tmp_path, "a dog", META)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_other_settings_or_none(tmp_path):
    assert read_candidates(tmp_path, "a dog", META) is None
    assert not has_candidates(tmp_path, "a dog", META)
    write_candidates(tmp_path, "a dog", pictures(), META)
    for change in ({"seed": 2}, {"model": "x"}, {"sampler": {"steps": 16, "guidance": 3.0}}):
        assert read_candidates(tmp_path, "a dog", META | change) is None
        assert not has_candidates(tmp_path, "a dog", META | change)
    assert read_candidates(tmp_path, "a cat", META) is None


def test_webdataset_reads_them(tmp_path):
    path = write_candidates(tmp_path, "a dog", pictures(), META)
    found = list(webdataset.WebDataset(str(path), shardshuffle=False).decode("rgb8"))
    assert [sample["json"]["candidate"] for sample in found] == [0, 1, 2]
    assert np.array_equal(found[1]["png"], np.asarray(pictures()[1]))


def test_damage_is_an_error_that_names_the_candidate(tmp_path):
    path = write_candidates(tmp_path, "a dog", pictures(), META)
    data = path.read_bytes()
    path.write_bytes(data[:1000])
    with refused(ShardError, "truncated"):
        read_candidates(tmp_path, "a dog", META)
    at = data.rindex(b"IDAT") + 10
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with refused(ShardError, "damaged", image_id("a dog", 2)):
        read_candidates(tmp_path, "a dog", META)


def test_another_prompts_file_is_not_taken(tmp_path):
    written = write_candidates(tmp_path, "a dog", pictures(), META)
    written.rename(candidates_path(tmp_path, "a cat"))
    with refused(ShardError, "mismatch"):
        read_candidates(tmp_path, "a cat", META)


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def test_bombs_and_other_formats_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(candidate_files, "MAX_PIXELS", 8 * 12 - 1)
    write_candidates(tmp_path, "a dog", pictures(), META)
    with refused(ShardError, "too-large"):
        read_candidates(tmp_path, "a dog", META)
    monkeypatch.setattr(candidate_files, "_encode", lambda image: encoded(image, "BMP"))
    write_candidates(tmp_path, "a dog", pictures(), META)
    with refused(ShardError, "damaged"):
        read_candidates(tmp_path, "a dog", META)
