"""Calling a reward: batches, the cache, and every way in which a reward can fail."""

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from cdpo.engine.basics.errors import DataError, OutsideError
from cdpo.engine.rewards.scored_call import (
    HOPELESS,
    NAMED,
    RECORD,
    ScoreCache,
    ScoredCall,
    score_key,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from refusals import refused

A_LOT = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"


def solid(red: int, size: int = 2) -> Image.Image:
    return Image.new("RGB", (size, size), (red, 0, 0))


def image_range(count: int) -> list[Image.Image]:
    return [solid(red) for red in range(count)]


class Red:
    """The red of an image's first pixel; notes the batches, and does what `before` does first."""

    fingerprint = "red"

    def __init__(self, before: Callable[[list[int]], object] = lambda reds: None) -> None:
        self.before = before
        self.batches: list[list[int]] = []

    def score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        assert len(images) == len(prompts)
        reds = [image.getpixel((0, 0))[0] for image in images]
        self.batches.append(reds)
        answer = self.before(reds)
        return np.asarray(reds, np.float32) if answer is None else answer


def call(scorer: Red, batch_size: int = 4, cache: Path | None = None) -> ScoredCall:
    return ScoredCall(scorer, "red", batch_size, cache=cache)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["a", "b"])), max_size=20))
def test_every_image_of_a_prompt_is_scored_once_and_answers_keep_their_places(asked):
    scorer = Red()
    reward = call(scorer)
    for _ in range(2):
        found = reward.score([solid(red) for red, _ in asked], [prompt for _, prompt in asked])
        assert found.dtype == np.float32
        assert found.tolist() == [red for red, _ in asked]
    assert sum(map(len, scorer.batches)) == len(set(asked))
    assert all(len(batch) <= 4 for batch in scorer.batches)


def test_none_and_unequal_numbers():
    assert call(Red()).score([], []).shape == (0,)
    with pytest.raises(ValueError, match="2 images but 1 prompts"):
        call(Red()).score(image_range(2), ["a"])


def test_an_image_that_raises_is_named_and_the_rest_go_on(capsys):
    def before(reds: list[int]) -> None:
        if 5 in reds:
            raise ZeroDivisionError("no\nred five")

    scorer = Red(before)
    found = call(scorer).score(image_range(8), ["a cat"] * 3 + ["a dog"] * 5)
    assert np.isnan(found).tolist() == [red == 5 for red in range(8)]
    assert scorer.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [4], [5], [6], [7]]
    said = capsys.readouterr().err
    assert "red: no score for candidate 2 of 'a dog', which is left out: ZeroDivisionError: no" in (
        " ".join(said.split())
    )


def test_many_failures_are_counted_and_only_some_are_named(capsys):
    def before(reds: list[int]) -> None:
        if len(reds) > 1 or reds[0] > 0:
            raise ValueError

    found = call(Red(before), batch_size=50).score(image_range(50), ["a"] * 50)
    assert np.isfinite(found).sum() == 1
    said = capsys.readouterr().err
    assert said.count("no score for") == NAMED
    assert said.count("are counted, not named") == 1


def test_a_reward_that_always_fails_is_an_error_before_long():
    def before(reds: list[int]) -> None:
        raise RuntimeError("wrong device")

    scorer = Red(before)
    with refused(DataError, "non-finite", "red"):
        call(scorer).score(image_range(200), ["a"] * 200)
    assert len(scorer.batches) <= 2 * HOPELESS


def overflows(from_red: int) -> Callable[[list[int]], np.ndarray]:
    def before(reds: list[int]) -> np.ndarray:
        return np.asarray([np.inf if red >= from_red else red for red in reds], np.float16)

    return before


@pytest.mark.parametrize("precision", ["fp16", "fp32", None])
def test_an_image_whose_score_is_no_number_is_named_with_the_remedy(capsys, precision):
    reward = ScoredCall(Red(overflows(3)), "red", 4, precision=precision)
    found = reward.score(image_range(50), ["a cat"] * 50)
    assert np.isfinite(found).sum() == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "red: no score for candidate 3 of 'a cat', which is left out: its score is inf" in said
    assert said.count("no score for") == NAMED and said.count("are counted, not named") == 1
    assert ("in fp16: say precision: fp32 in its section" in said) == (precision == "fp16")


def test_a_network_whose_scores_all_overflow_ends_the_run_before_long():
    scorer = Red(overflows(0))
    with refused(DataError, "non-finite", "red") as told:
        ScoredCall(scorer, "red", 4, precision="fp16").score(image_range(200), ["a"] * 200)
    assert "precision: fp32" in str(told.value) and len(scorer.batches) == HOPELESS / 4


def test_a_function_may_give_no_score_to_any_number_of_images():
    assert np.isnan(
        call(Red(lambda reds: np.full(len(reds), np.nan))).score(image_range(99), ["a"] * 99)
    ).all()


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (lambda reds: np.zeros(len(reds) + 1), "mismatch"),
        (lambda reds: np.zeros((len(reds), 1)), "mismatch"),
        (lambda reds: list(range(len(reds))), "wrong-type"),
        (lambda reds: ["good"] * len(reds), "wrong-type"),
        (lambda reds: 0.5, "mismatch"),
        (lambda reds: np.arange(len(reds)), "wrong-type"),
    ],
)
def test_an_answer_of_another_length_or_type_is_an_error(answer, kind):
    with refused(DataError, kind, "red"):
        call(Red(answer)).score(image_range(4), ["a"] * 4)


def test_nan_stays_nan_and_is_asked_for_again(tmp_path):
    def before(reds: list[int]) -> np.ndarray:
        return np.asarray([np.nan if red == 1 else red for red in reds], np.float16)

    found = call(Red(before), cache=tmp_path).score(image_range(3), ["a"] * 3)
    assert np.isnan(found).tolist() == [False, True, False]
    scorer = Red()
    again = call(scorer, cache=tmp_path).score(image_range(3), ["a"] * 3)
    assert again.tolist() == [0, 1, 2] and scorer.batches == [[1]]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError(A_LOT),
        MemoryError(),
    ],
)
def test_out_of_memory_halves_the_batch_for_good_and_says_so(error, capsys):
    def before(reds: list[int]) -> None:
        if len(reds) > 3:
            raise error

    scorer = Red(before)
    reward = call(scorer, batch_size=16)
    assert reward.score(image_range(10), ["a"] * 10).tolist() == list(range(10))
    assert [len(batch) for batch in scorer.batches] == [10, 5, 2, 2, 2, 2, 2]
    said = " ".join(capsys.readouterr().err.split())
    assert "red: out of memory with 5 images in one call; it goes on with 2" in said
    reward.score([solid(red) for red in range(20, 23)], ["a"] * 3)
    assert [len(batch) for batch in scorer.batches[7:]] == [2, 1]
    assert "out of memory" not in capsys.readouterr().err


def test_out_of_memory_with_one_image_is_an_error():
    def before(reds: list[int]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nof 1 GiB")

    with refused(OutsideError, "too-large", "red") as told:
        call(Red(before)).score(image_range(4), ["a"] * 4)
    assert "\n" not in str(told.value)


def test_a_device_that_has_failed_ends_the_run_and_costs_no_image_its_score():
    """A CUDA error stays: every later call fails as well, whatever the image."""

    def before(reds: list[int]) -> None:
        if reds[-1] > 3:
            raise torch.AcceleratorError("CUDA error: an illegal memory access\nfor debugging")

    scorer = Red(before)
    with refused(OutsideError, "device", "red") as told:
        call(scorer).score(image_range(9), ["a cat"] * 9)
    assert "from candidate 4 of 'a cat' on: CUDA error: an illegal" in str(told.value)
    assert scorer.batches == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_other_errors_of_the_run_are_not_taken_for_those_of_an_image():
    def before(reds: list[int]) -> None:
        raise OutsideError("the disk is gone", kind="unreadable")

    with refused(OutsideError, "unreadable"):
        call(Red(before)).score(image_range(4), ["a"] * 4)


# The cache


def test_scores_outlive_the_process(tmp_path):
    call(Red(), cache=tmp_path).score(image_range(5), ["a"] * 5)
    scorer = Red()
    found = call(scorer, cache=tmp_path).score(image_range(6), ["a"] * 6)
    assert found.tolist() == list(range(6)) and scorer.batches == [[5]]


def test_another_reward_or_setting_has_its_own_cache(tmp_path):
    call(Red(), cache=tmp_path).score(image_range(2), ["a"] * 2)
    scorer = Red()
    ScoredCall(scorer, "red", 4, settings="bf16", cache=tmp_path).score(image_range(2), ["a"] * 2)
    assert scorer.batches == [[0, 1]]


def test_keys_tell_images_and_prompts_apart():
    one, other = (Image.frombytes("L", size, bytes(6)) for size in ((2, 3), (3, 2)))
    keys = {score_key(image, prompt) for prompt in ("", "a", "a ") for image in (one, other)}
    assert len(keys) == 6
    assert score_key(one, "a") == score_key(one.copy(), "a")


def test_a_folder_of_more_scores_than_there_is_room_for(tmp_path, monkeypatch):
    """Half of the room is filled, and what was read stays when a score joins."""
    keys = [bytes([number]) * 32 for number in range(20)]
    ScoreCache(tmp_path).add(dict.fromkeys(keys, 1.0))
    monkeypatch.setattr("cdpo.engine.rewards.scored_call.KEPT", 8)
    cache = ScoreCache(tmp_path)
    assert [key in cache for key in keys] == [True] * 4 + [False] * 16
    cache.add({keys[9]: 2.0})
    assert [key in cache for key in keys[:4]] == [True] * 4 and cache[keys[9]] == 2.0


@pytest.mark.parametrize("damage", [1, 17, RECORD.size, RECORD.size + 3])
def test_what_a_kill_left_half_written_is_passed_over(tmp_path, damage):
    """Cut anywhere, the whole records count; a flipped bit costs its own record."""
    cache = ScoreCache(tmp_path)
    keys = [bytes([number]) * 32 for number in range(3)]
    cache.add({key: float(number) for number, key in enumerate(keys)})
    [path] = tmp_path.glob("*.scores")
    whole = path.read_bytes()
    path.write_bytes(whole[:-damage])
    kept = (len(whole) - damage) // RECORD.size
    assert [key in ScoreCache(tmp_path) for key in keys] == [n < kept for n in range(3)]
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert [key in ScoreCache(tmp_path) for key in keys] == [False, True, True]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(self: Path, *args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    reward = call(Red(), cache=tmp_path)
    monkeypatch.setattr(Path, "open", full)
    with refused(DataError, "unwritable"):
        reward.score(image_range(2), ["a"] * 2)
