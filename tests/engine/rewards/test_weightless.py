"""Rewards that need no weights, against their definitions worked out in another way."""

import importlib
import io
import re
import sys
from typing import Literal

import numpy as np
import pytest
import torch
from cdpo.engine import rewards
from cdpo.engine.basics.errors import OutsideError
from cdpo.engine.recipe.keys import SCHEMA, sections_of
from cdpo.engine.recipe.reward import (
    ColorfulnessSpec,
    JpegIncompressibilitySpec,
    JpegSpec,
    PythonSpec,
    RewardSection,
)
from cdpo.engine.recipe.section import PositiveInt
from cdpo.engine.rewards import load_reward
from PIL import Image
from refusals import refused
from reward_files import pictures

CPU = torch.device("cpu")


def score(spec, images):
    return load_reward(spec, CPU).score(images, ["a dog"] * len(images))


def test_colorfulness_pixel_by_pixel():
    """sqrt(var(rg) + var(yb)) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2), with variances as differences of
    moments of whole numbers.
    """
    images = pictures(3, (9, 5))
    found = score(ColorfulnessSpec(), images)
    for image, value in zip(images, found, strict=True):
        pixels = [tuple(map(int, pixel)) for pixel in np.asarray(image).reshape(-1, 3)]
        count = len(pixels)
        red_green = [r - g for r, g, b in pixels]
        doubled = [r + g - 2 * b for r, g, b in pixels]  # twice yellow-blue: stays whole
        spread = sum(v * v for v in red_green) / count - (sum(red_green) / count) ** 2
        spread += (sum(v * v for v in doubled) / count - (sum(doubled) / count) ** 2) / 4
        mean = (sum(red_green) / count) ** 2 + (sum(doubled) / count / 2) ** 2
        assert value == pytest.approx(spread**0.5 + 0.3 * mean**0.5, rel=1e-6)


def test_gray_has_no_color_and_one_color_has_no_spread():
    gray, red = Image.new("L", (8, 8), 90), Image.new("RGB", (8, 8), (255, 0, 0))
    found = score(ColorfulnessSpec(), [gray, red])
    assert found[0] == 0
    assert found[1] == pytest.approx(0.3 * (255**2 + 127.5**2) ** 0.5)


def test_jpeg_sizes_are_those_of_files(tmp_path):
    images = [*pictures(2, (32, 32)), Image.new("RGB", (32, 32))]
    found = score(JpegIncompressibilitySpec(), images)
    for number, image in enumerate(images):
        path = tmp_path / f"{number}.jpg"
        image.save(path, quality=95)
        assert found[number] == pytest.approx(path.stat().st_size / 1000)
    assert found[2] < found[0]
    np.testing.assert_array_equal(score(JpegSpec(), images), -found)
    buffer = io.BytesIO()
    images[0].convert("RGBA").save(buffer, "PNG")  # a mode that JPEG does not know
    assert score(JpegIncompressibilitySpec(), [Image.open(buffer)])[0] == found[0]


def test_fingerprints_tell_rewards_apart_by_their_first_letters():
    """Which are all that goes into the source of scores and the name of a cache."""
    specs = (ColorfulnessSpec(), JpegSpec(), JpegIncompressibilitySpec())
    found = [load_reward(spec, CPU).fingerprint for spec in specs]
    assert all(re.fullmatch("[0-9a-f]{64}", fingerprint) for fingerprint in found)
    assert len({fingerprint[:16] for fingerprint in found}) == 3


BRIGHTNESS = """
import hashlib
import numpy as np

class Brightness:
    fingerprint = hashlib.sha256(b"brightness 1").hexdigest()

    def __init__(self, spec, device):
        self.ceiling = spec.ceiling

    def score_batch(self, images, prompts):
        means = [np.asarray(image.convert("L"), float).mean() for image in images]
        return np.minimum(means, self.ceiling)
"""


class BrightnessSpec(RewardSection):
    """What a newcomer writes into the schema."""

    made_by = "brightness:Brightness"
    type: Literal["brightness"] = "brightness"
    ceiling: PositiveInt = 255


def test_a_new_reward_is_one_file_and_one_entry_of_the_schema(tmp_path, monkeypatch):
    (tmp_path / "brightness.py").write_text(BRIGHTNESS)
    monkeypatch.setattr(rewards, "__path__", [*rewards.__path__, str(tmp_path)])
    images = [Image.new("RGB", (4, 4), (level,) * 3) for level in (10, 200)]
    assert score(BrightnessSpec(), images).tolist() == [10, 200]
    assert score(BrightnessSpec(ceiling=100), images).tolist() == [10, 100]
    plain, capped = (load_reward(BrightnessSpec(ceiling=c), CPU).fingerprint for c in (255, 100))
    assert plain != capped, "a knob of the schema is a part of the fingerprint"


def test_every_reward_of_the_schema_names_what_makes_it():
    for section in sections_of(SCHEMA["reward"]):
        module, name = section.made_by.split(":")
        assert callable(getattr(importlib.import_module(f"{rewards.__name__}.{module}"), name))


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of the user's and returns the recipe's name of its function `score`."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(body: str, name: str = "my_rewards") -> str:
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(body)
        importlib.invalidate_caches()
        return f"{name}:score"

    return write


def test_a_function_of_ones_own(module):
    name = module(
        "def score(images, prompts):\n"
        "    assert isinstance(images, list) and isinstance(prompts, list)\n"
        "    return [image.width / len(prompt) for image, prompt in zip(images, prompts)]\n"
    )
    reward = load_reward(PythonSpec(function=name, batch_size=2), CPU)
    found = reward.score(pictures(3, (4, 10)), ["ab", "abcde", "x"])
    assert found.tolist() == [5, 2, 10] and found.dtype == np.float32


def test_an_edited_function_has_another_fingerprint(module):
    def fingerprint(body: str, name: str) -> str:
        return load_reward(PythonSpec(function=module(body, name)), CPU).fingerprint

    first = "def score(images, prompts):\n    return [0.0] * len(images)\n"
    assert fingerprint(first, "one") == fingerprint(first, "one")
    assert fingerprint(first, "one") != fingerprint(first.replace("0.0", "1.0"), "one")


def test_an_edited_function_behind_a_wrapper_has_another_fingerprint(module):
    """Of another module, and one that does not say what it wraps."""

    def fingerprint(value: str) -> str:
        body = "from functools import partial\ndef own(value, images, prompts):\n"
        body += f"    return [value] * len(images)\nscore = partial(own, {value})\n"
        return load_reward(PythonSpec(function=module(body)), CPU).fingerprint

    assert fingerprint("0.0") == fingerprint("0.0") != fingerprint("1.0")


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (None, "not-installed"),
        ("raise RuntimeError('no\\nlicence')", "not-installed"),
        ("def scores(): pass", "not-installed"),
        ("score = 3", "wrong-type"),
        ("import no_such_module", "not-installed"),
    ],
)
def test_a_function_that_cannot_be_had_is_one_line(module, body, kind):
    name = "no_such_module:score" if body is None else module(body)
    with refused(OutsideError, kind, "reward.function") as told:
        load_reward(PythonSpec(function=name), CPU)
    assert name in str(told.value) and "\n" not in str(told.value)
