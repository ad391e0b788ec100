"""Stage 1 on the tiny world: what the shards hold, and that neither kills nor order change it."""

import json
import shutil
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import tiny
from cdpo.engine.basics.errors import DataError
from cdpo.engine.display.terminal import Terminal
from cdpo.engine.preparing import preparation, shard_set
from cdpo.engine.preparing.candidates import CandidateSet
from cdpo.engine.preparing.rankers import reward as reward_ranker
from cdpo.engine.recipe.reading import load_recipe
from cdpo.engine.shards.manifest import Manifest, load_manifest
from cdpo.engine.shards.reader import ShardReaders
from PIL import Image
from prepared import (
    candidate_of,
    candidates_of,
    contents,
    pairs_of,
    prepare,
    scores_of,
)
from refusals import refused

CANDIDATES, TIERS, BUDGET = 6, 3, 6  # of the tiny recipe
WEIGHTS = {"model.path": "sd", "reward.path": "reward"}


class FakeReward:
    """Scores by a function of the prompt; by default the mean of the red channel."""

    fingerprint = "fake"
    identity: ClassVar = {"weights": "fake", "whole": "fake"}

    def __init__(self, of_prompt: Callable[[str, np.ndarray], object]) -> None:
        self.of_prompt = of_prompt

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        red = np.asarray([np.asarray(image)[:, :, 0].mean() for image in images], np.float32)
        scores = np.broadcast_to(self.of_prompt(prompts[0], red), red.shape)
        return scores.astype(np.float32)


@pytest.fixture
def reward(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a fake in the place of the recipe's reward."""

    def put(of_prompt: Callable[[str, np.ndarray], object]) -> None:
        monkeypatch.setattr(reward_ranker, "load_reward", lambda *_: FakeReward(of_prompt))

    return put


@pytest.fixture
def plain(made: Callable[[str], Path]) -> Path:
    """The run folder of an undisturbed stage 1: not to be written to."""
    return made("sampled")


# What comes out


def test_pairs_are_ranked_and_tiered_by_the_reward(plain):
    """Against the definition: rank by score, tier k holds (M-1)(B-k)/B < j-i <= (M-1)(B-k+1)/B."""
    scores = scores_of(plain)
    assert {len(values) for values in scores.values()} == {CANDIDATES}
    by_tier: dict[tuple[str, int], int] = {}
    for meta, _ in pairs_of(plain / "shards"):
        own = scores[meta.prompt]
        winner, loser = map(candidate_of, meta.images)
        order = sorted(range(CANDIDATES), key=lambda index: -own[index])
        ranks = (order.index(winner) + 1, order.index(loser) + 1)
        assert meta.ranks == ranks
        assert meta.scores == (pytest.approx(own[winner]), pytest.approx(own[loser]))
        assert meta.scores[0] > meta.scores[1]
        width, gap = Fraction(CANDIDATES - 1, TIERS), ranks[1] - ranks[0]
        assert width * (TIERS - meta.tier) < gap <= width * (TIERS - meta.tier + 1)
        by_tier[meta.prompt, meta.tier] = by_tier.get((meta.prompt, meta.tier), 0) + 1
    assert all(count <= BUDGET for count in by_tier.values())
    assert {tier for _, tier in by_tier} == set(range(1, TIERS + 1))


def test_latents_are_those_of_the_images_the_record_names(plain, tiny_backbone):
    manifest = load_manifest(plain / "shards")
    candidates = candidates_of(plain)
    for meta, found in pairs_of(plain / "shards"):
        assert found.shape == (2, *manifest.latent_shape) and found.dtype == np.float16
        images = [candidates[meta.prompt][candidate_of(image)] for image in meta.images]
        expected = tiny_backbone.encode_images(images).numpy()
        np.testing.assert_allclose(found, expected, rtol=2**-10, atol=1e-5)


def test_the_manifest_says_what_is_there(plain, tiny_world, tiny_backbone):
    manifest = load_manifest(plain / "shards")
    pairs = pairs_of(plain / "shards")
    files = {path.name for path in (plain / "shards").glob("*.tar")}
    assert {entry.name for entry in manifest.shards} == files
    readers = ShardReaders(plain / "shards", manifest)
    readers.check_present(manifest.shards)
    assert sum(len(readers.keys(entry)) for entry in manifest.shards) == len(pairs)  # and sha256
    assert len({meta.pair_id for meta, _ in pairs}) == len(pairs) == manifest.num_pairs
    fingerprints = tiny_backbone.fingerprints()
    assert manifest.model.fingerprint == fingerprints["model"]
    assert manifest.vae.fingerprint == fingerprints["vae"]
    assert manifest.vae.scaling_factor == 0.5
    assert (manifest.reward.type, manifest.reward.path) == (
        "clip_score",
        str(tiny_world / "reward"),
    )
    assert (manifest.seed, manifest.lanes, manifest.tiers) == (3, 2, TIERS)
    assert manifest.resolution == (16, 16)


def test_the_statistics_add_up(plain):
    manifest = load_manifest(plain / "shards")
    statistics = manifest.statistics
    prompts = len(tiny.PROMPTS)
    assert statistics.prompts == prompts
    assert statistics.candidates == prompts * CANDIDATES
    assert statistics.eligible_pairs == prompts * CANDIDATES * (CANDIDATES - 1) // 2
    assert statistics.dropped_candidates == statistics.tied_prompts == 0
    assert statistics.prompts_without_pairs == 0
    by_tier = [0] * TIERS
    for meta, _ in pairs_of(plain / "shards"):
        by_tier[meta.tier - 1] += 1
    assert statistics.pairs_by_tier == tuple(by_tier)
    # Gaps 5, 4 (3 pairs) are easy, 3, 2 (3 + 4 pairs) next, 1 (5 pairs) hard; at most 6 are kept.
    formed = [prompts * min(BUDGET, count) for count in (1 + 2, 3 + 4, 5)]
    written = zip(by_tier, statistics.dropped_remainder_by_tier, strict=True)
    assert [kept + dropped for kept, dropped in written] == formed


def test_what_else_is_left_behind(plain):
    """No temporary files, no latents that only the shards needed."""
    names = {path.name for path in plain.iterdir()}
    assert names == {
        *("candidates", "contact_sheet.png", "recipe.yaml", "score_cache", "scores.parquet"),
        *("shards", ".shards.lock"),
    }
    assert not list(plain.rglob("*.tmp"))
    with Image.open(plain / "contact_sheet.png") as sheet:
        sheet.load()
        assert sheet.width > 6 * 16 and sheet.height > 2 * 16
    assert load_recipe(plain / "recipe.yaml").run_dir == str(plain)


# Again


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-512])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a shard is missing": lambda shards: next(shards.glob("*.tar")).unlink(),
    "a shard is cut": lambda shards: cut(next(shards.glob("*.tar"))),
    "the manifest is damaged": lambda shards: (shards / "manifest.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_set_is_written_again(plain, tiny_recipe, ranks, damage, capsys):
    """Train says "prepare again": that must not answer "nothing to do", or the same error."""
    recipe = tiny_recipe()
    shutil.copytree(plain, recipe.run_dir)
    DAMAGES[damage](Path(recipe.run_dir) / "shards")
    shards = prepare(recipe, ranks, Terminal())
    assert "written again" in capsys.readouterr().err
    assert contents(shards) == contents(plain / "shards")


def test_other_tars_in_the_folder_are_left_alone(tiny_recipe, ranks, tmp_path):
    mine = tmp_path / "data" / "laion-00000.tar"
    mine.parent.mkdir()
    mine.write_text("mine")
    stale = [tmp_path / "data" / f"tier-9-000000.tar{ending}" for ending in ("", ".tmp")]
    for path in stale:
        path.write_text("of an older set")
    shards = prepare(tiny_recipe(f"data.path={tmp_path / 'data'}", "prompts.limit=2"), ranks)
    assert shards == tmp_path / "data"
    assert mine.read_text() == "mine" and not any(path.exists() for path in stale)


# Killed


def test_killed_before_the_manifest_and_started_again(plain, tiny_recipe, ranks, monkeypatch):
    def die(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(preparation, "save_manifest", die)
        prepare(tiny_recipe(), ranks)
    assert contents(prepare(tiny_recipe(), ranks)) == contents(plain / "shards")
    assert (Path(tiny_recipe().run_dir) / "contact_sheet.png").exists()


def test_killed_and_started_again_with_another_recipe(tiny_recipe, ranks, monkeypatch):
    """Nothing of the first recipe is in the shards of the second."""
    few, other = "prompts.limit=3", "prepare.sampler.guidance=5.0"
    fresh = prepare(tiny_recipe(few, other, run="fresh"), ranks)

    def die(name: str) -> None:
        if name == "prepare.shard":
            raise KeyboardInterrupt

    monkeypatch.setattr(shard_set, "failpoint", die)
    with pytest.raises(KeyboardInterrupt):
        prepare(tiny_recipe(few), ranks)
    monkeypatch.undo()
    assert contents(prepare(tiny_recipe(few, other), ranks)) == contents(fresh)


# Prompts and rewards


def test_the_order_of_the_prompt_file_does_not_matter(plain, tiny_recipe, ranks, tmp_path):
    """The same shards to the byte; only the manifest's hash of the inputs differs."""
    (tmp_path / "backwards.txt").write_text("\n".join(tiny.PROMPTS[::-1]))
    shards = prepare(tiny_recipe(f"prompts.train={tmp_path / 'backwards.txt'}"), ranks)
    found, expected = contents(shards), contents(plain / "shards")
    before, after = (json.loads(files.pop("manifest.json")) for files in (expected, found))
    assert found == expected
    assert {key for key in before if before[key] != after[key]} <= {"fingerprint"}


def statistics_of(shards: Path) -> dict[str, object]:
    manifest: Manifest = load_manifest(shards)
    return manifest.statistics.model_dump()


def test_candidates_without_a_finite_reward_are_dropped_and_counted(
    tiny_recipe, ranks, reward, capsys
):
    def fail(prompt: str, red: np.ndarray) -> np.ndarray:
        bad = {"house": [0], "tree": [2, 3]}.get(prompt, [])
        red[bad] = [float("nan"), float("inf")][: len(bad)]
        return red

    reward(fail)
    shards = prepare(tiny_recipe(), ranks, Terminal())
    assert "3 candidates had no finite reward" in capsys.readouterr().err
    statistics = statistics_of(shards)
    assert statistics["dropped_candidates"] == 3
    assert statistics["prompts_without_pairs"] == 0
    assert statistics["eligible_pairs"] == 5 * 15 + 10 + 6
    used = {(m.prompt, candidate_of(i)) for m, _ in pairs_of(shards) for i in m.images}
    assert not used & {("house", 0), ("tree", 2), ("tree", 3)}
    ranks_seen = {rank for m, _ in pairs_of(shards) if m.prompt == "tree" for rank in m.ranks}
    assert ranks_seen <= {1, 2, 3, 4}


def test_prompts_beyond_what_the_encoder_reads_are_counted(tiny_recipe, ranks, tmp_path, capsys):
    prompts = tmp_path / "long.txt"
    prompts.write_text(f"red apple\n{'very ' * 100}red apple\n{'tree ' * 90}\n")
    prepare(tiny_recipe(f"prompts.train={prompts}"), ranks, Terminal())
    said = capsys.readouterr().err
    assert "2 prompts have more than the" in said and said.count("tokens that the text") == 1


def test_a_prompt_whose_candidates_all_tie_is_skipped_and_counted(
    tiny_recipe, ranks, reward, capsys
):
    reward(lambda prompt, red: 0.5 if prompt in ("house", "tree") else red)
    shards = prepare(tiny_recipe(), ranks, Terminal())
    assert "2 prompts gave no pair" in capsys.readouterr().err
    statistics = statistics_of(shards)
    assert statistics["tied_prompts"] == statistics["prompts_without_pairs"] == 2
    assert {m.prompt for m, _ in pairs_of(shards)} == set(tiny.PROMPTS) - {"house", "tree"}


@pytest.mark.parametrize("score", [0.5, float("nan")])
def test_no_pairs_at_all_is_an_error_and_leaves_no_manifest(tiny_recipe, ranks, reward, score):
    reward(lambda prompt, red: score)
    with refused(DataError, "empty", "curriculum.min_score_gap", wording="no-pairs"):
        prepare(tiny_recipe(), ranks)
    assert not (Path(tiny_recipe().run_dir) / "shards" / "manifest.json").exists()


def test_a_score_cut_off_that_empties_a_tier_says_what_to_do(tiny_recipe, ranks, reward):
    """One image far above the rest: five pairs, of which the last tier gets one for two lanes."""
    reward(lambda prompt, red: np.where(red == red.max(), 1.0, red * 1e-6))
    with refused(DataError, "too-few", "tier 3", wording="tier-of-too-few-pairs"):
        prepare(tiny_recipe("curriculum.min_score_gap=0.5", "prompts.limit=1"), ranks)


def test_images_that_were_sampled_are_not_sampled_for_another_reward(
    plain, tiny_recipe, tiny_world, ranks, monkeypatch
):
    """Another reward ranks the same candidates: hours of sampling are kept."""
    recipe = tiny_recipe(f"reward.path={tiny_world / 'judge'}")
    shutil.copytree(plain, recipe.run_dir)
    monkeypatch.setattr(CandidateSet, "write", lambda *_: pytest.fail("sampled again"))
    shards = prepare(recipe, ranks)
    assert load_manifest(shards).reward.path == str(tiny_world / "judge")
    assert contents(shards) != contents(plain / "shards")
