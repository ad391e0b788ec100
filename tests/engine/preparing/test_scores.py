"""Scores on disk: nothing is scored twice, nothing of another source is taken."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cdpo.engine.basics.errors import DataError
from cdpo.engine.basics.keyed import content_id
from cdpo.engine.display.terminal import Terminal
from cdpo.engine.preparing.candidates import CandidateSet
from cdpo.engine.preparing.sampled import CandidateParts
from cdpo.engine.preparing.scores import Scoring
from cdpo.engine.ranks import Ranks
from cdpo.engine.sources.pictures import Tolerance
from PIL import Image
from refusals import refused

PROMPTS = ["a dog", "a cat", "a café", "a cow"]
COUNT = 3


class RedReward:
    """The red of an image's first pixel; counts the images it was shown."""

    fingerprint = "red"

    def __init__(self, change: Callable[[np.ndarray], np.ndarray] = lambda scores: scores) -> None:
        self.change = change
        self.scored: list[str] = []

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        assert len(images) == len(prompts)
        self.scored += prompts
        red = [image.getpixel((0, 0))[0] for image in images]
        return self.change(np.asarray(red, np.float32))


@pytest.fixture
def images(tmp_path: Path) -> CandidateSet:
    """Candidates whose red is 10 x prompt + candidate."""
    candidates = CandidateSet(tmp_path / "candidates", {"count": COUNT})
    for row, prompt in enumerate(PROMPTS):
        colors = [(10 * row + index, 0, 0) for index in range(COUNT)]
        candidates.write(prompt, [Image.new("RGB", (4, 4), color) for color in colors])
    return candidates


@pytest.fixture
def score(
    tmp_path: Path, images: CandidateSet, ranks: Ranks, terminal: Terminal
) -> Callable[..., dict[str, np.ndarray]]:
    def run(
        reward: RedReward, prompts: Sequence[str] = PROMPTS, source: str = "red"
    ) -> dict[str, np.ndarray]:
        parts = CandidateParts(prompts, images, (4, 4))
        found = Scoring(tmp_path, source, parts, ranks).run(reward, 2, Tolerance(0), terminal)
        return dict(zip(prompts, found, strict=True))

    return run


def expected(prompts: Sequence[str] = PROMPTS) -> dict[str, list[float]]:
    return {p: [10.0 * PROMPTS.index(p) + index for index in range(COUNT)] for p in prompts}


def as_lists(scores: dict[str, np.ndarray]) -> dict[str, list[float]]:
    return {prompt: values.tolist() for prompt, values in scores.items()}


def test_one_table_of_all_scores(score, tmp_path):
    found = score(RedReward())
    assert as_lists(found) == expected()
    assert {values.dtype for values in found.values()} == {np.dtype(np.float32)}
    assert not (tmp_path / "scores").exists()
    table = pq.read_table(tmp_path / "scores.parquet").to_pylist()
    assert table == [
        {
            "prompt_id": content_id(prompt),
            "prompt": prompt,
            "candidate": index,
            "score": value,
            "source": "red",
        }
        for prompt, values in expected().items()
        for index, value in enumerate(values)
    ]


def test_what_is_scored_is_not_scored_again(score):
    score(RedReward(), PROMPTS[:2])
    reward = RedReward()
    assert as_lists(score(reward)) == expected()
    assert reward.scored == [prompt for prompt in PROMPTS[2:] for _ in range(COUNT)]
    reward = RedReward()
    assert as_lists(score(reward)) == expected()
    assert reward.scored == []


def test_prompts_no_longer_asked_for_go_and_order_follows_the_question(score, tmp_path):
    score(RedReward())
    fewer = [PROMPTS[2], PROMPTS[0]]
    assert as_lists(score(RedReward(), fewer)) == expected(fewer)
    table = pq.read_table(tmp_path / "scores.parquet")
    assert table["prompt"].to_pylist() == [prompt for prompt in fewer for _ in range(COUNT)]


@pytest.mark.parametrize("passage", [2, 4])
def test_killed_while_scoring(score, tmp_path, monkeypatch, passage):
    """Parts that were written count. Half a part that was being written does no harm."""
    written = []

    def write_and_die(table: pa.Table, sink: pa.NativeFile) -> None:
        written.append(table)
        if len(written) == passage:
            (tmp_path / "scores" / "part-0000-f00.parquet.tmp").write_bytes(b"PAR1 half a file")
            raise KeyboardInterrupt
        original(table, sink)

    original = pq.write_table
    monkeypatch.setattr(pq, "write_table", write_and_die)
    with pytest.raises(KeyboardInterrupt):
        score(RedReward())
    monkeypatch.undo()
    reward = RedReward()
    assert as_lists(score(reward)) == expected()
    assert set(reward.scored) == set(PROMPTS[passage - 1 :])
    assert not (tmp_path / "scores").exists()


def test_another_source_is_scored_afresh_and_replaces_the_table(score, tmp_path):
    """Another reward, or other images of the same prompts."""
    score(RedReward(lambda scores: scores + 1), source="other")
    reward = RedReward()
    assert as_lists(score(reward)) == expected()
    assert len(reward.scored) == len(PROMPTS) * COUNT
    assert set(pq.read_table(tmp_path / "scores.parquet")["source"].to_pylist()) == {"red"}


def test_a_missing_score_stays_missing(score, tmp_path):
    """NaN is the mark of a reward that failed: never 0, and still there after a resume."""
    fail = RedReward(lambda scores: np.where(scores % 10 == 1, np.nan, scores))
    for reward in (fail, RedReward()):
        found = score(reward)
        assert all(np.isnan(values).tolist() == [False, True, False] for values in found.values())


def test_prompts_without_any_score_are_asked_for_again(score):
    """What fails on all of a prompt is rarely its images: a file, a server, a key of the user's."""
    fail = RedReward(lambda scores: np.where(scores >= 20, np.nan, scores))
    assert np.isnan(list(score(fail).values())[2:]).all()
    mended = RedReward()
    assert as_lists(score(mended)) == expected()
    assert mended.scored == [prompt for prompt in PROMPTS[2:] for _ in range(COUNT)]


def test_a_reward_must_return_one_floating_number_an_image(score, tmp_path):
    with refused(DataError, "mismatch", "the reward"):
        score(RedReward(lambda scores: scores[:-1]))
    assert not list(tmp_path.rglob("*.parquet"))


def test_rewards_in_other_precisions_are_taken(score):
    found = score(RedReward(lambda scores: scores.astype(np.float16)))
    assert as_lists(found) == expected()


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(score, tmp_path, fill_disk):
    fill_disk()
    with refused(DataError, "unwritable"):
        score(RedReward())
    assert list((tmp_path / "scores").iterdir()) == []


def as_texts(table: pa.Table) -> pa.Table:
    column = [f"{score}x" for score in table["score"].to_pylist()]
    return table.set_column(table.column_names.index("score"), "score", pa.array(column))


@pytest.mark.parametrize(
    "change",
    [
        None,  # cut
        lambda table: table.drop_columns(["score"]),
        lambda table: table.slice(1),
        lambda table: table.take([1, 0, *range(2, len(table))]),
        as_texts,
    ],
)
def test_a_damaged_table_is_named(score, tmp_path, change):
    score(RedReward())
    path = tmp_path / "scores.parquet"
    if change is None:
        path.write_bytes(path.read_bytes()[:-20])
    else:
        pq.write_table(change(pq.read_table(path)), path)
    with refused(DataError, "damaged", str(path)) as caught:
        score(RedReward())
    assert "\n" not in str(caught.value)
