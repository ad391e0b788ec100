"""Losers of masked prompts: pairs, tiers and images as the recipe says, killed or not, on one rank
or two, and through all three verbs.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from cdpo.engine.basics import keyed
from cdpo.engine.basics.keyed import Stream, content_id
from cdpo.engine.models.masking import PromptMask
from cdpo.engine.preparing.candidates import CandidateSet
from cdpo.engine.preparing.preparation import Preparation
from cdpo.engine.preparing.rankers.masked import MaskedRanker
from cdpo.engine.preparing.sampled import CandidateParts
from cdpo.engine.preparing.shard_tools.command import main as shard_tools
from cdpo.engine.recipe import Recipe
from cdpo.engine.shards.manifest import load_manifest
from cdpo.engine.shards.sample import PairMeta
from launching import KILLED, losses
from prepared import OVERRIDES, candidate_of, candidates_of, contents, pairs_of

SHARES = (0.9, 0.5, 0.1)
WINNERS, BUDGET = 4, 3
MASKED = OVERRIDES["masked"]
PER_PROMPT = WINNERS + len(SHARES) * BUDGET


@pytest.fixture
def plain(made: Callable[[str], Path]) -> Path:
    """The run folder of an undisturbed stage 1: not to be written to."""
    return made("masked")


# --------------------------------------------------------------------------------------------------
# What comes out


def test_each_tier_pairs_winners_with_losers_of_its_share(plain):
    by_tier: dict[tuple[str, int], list[PairMeta]] = defaultdict(list)
    for meta, _ in pairs_of(plain / "shards"):
        by_tier[meta.prompt, meta.tier].append(meta)
    used: Counter[tuple[str, int]] = Counter()
    for (prompt, tier), pairs in by_tier.items():
        share = SHARES[tier - 1]
        winners = [candidate_of(meta.images[0]) for meta in pairs]
        losers = [candidate_of(meta.images[1]) for meta in pairs]
        assert len(set(winners)) == len(winners) <= BUDGET and set(winners) < set(range(WINNERS))
        first = WINNERS + (tier - 1) * BUDGET
        assert set(losers) <= set(range(first, first + BUDGET))
        assert {meta.scores for meta in pairs} == {(0.0, -share)}
        assert {meta.ranks for meta in pairs} == {(1, 2 + sorted(SHARES).index(share))}
        used.update((prompt, loser) for loser in losers)
    assert {tier for _, tier in by_tier} == {1, 2, 3}
    assert set(used.values()) == {1}  # a loser is in one pair


def test_the_manifest_says_what_ranked_them(plain, capsys):
    manifest = load_manifest(plain / "shards")
    assert (manifest.reward.type, manifest.tiers) == ("masked", len(SHARES))
    statistics = manifest.statistics
    prompts = len(tiny.PROMPTS)
    assert (statistics.prompts, statistics.candidates) == (prompts, prompts * PER_PROMPT)
    assert statistics.eligible_pairs == prompts * WINNERS * len(SHARES)
    assert statistics.dropped_candidates == statistics.tied_prompts == 0
    written = zip(statistics.pairs_by_tier, statistics.dropped_remainder_by_tier, strict=True)
    assert [kept + left for kept, left in written] == [prompts * BUDGET] * len(SHARES)
    assert shard_tools(["check", str(plain / "shards")]) == 0
    assert shard_tools(["show", str(plain / "shards")]) == 0
    shown = capsys.readouterr().out
    assert "masked prompts" in shown and "-0.9" in shown
    names = {path.name for path in plain.iterdir()}
    assert names == {"candidates", "contact_sheet.png", "recipe.yaml", "shards", ".shards.lock"}


def test_images_are_drawn_from_the_noise_and_the_mask_of_their_winner(
    plain, tiny_backbone, tiny_recipe
):
    """One pair of each tier drawn again by hand, from keys that are written out here."""
    prompt = tiny.PROMPTS[1]
    kept = candidates_of(plain)[prompt]
    assert len(kept) == PER_PROMPT
    own = [meta for meta, _ in pairs_of(plain / "shards") if meta.prompt == prompt]
    for tier, share in enumerate(SHARES, start=1):
        pair = next(meta for meta in own if meta.tier == tier)
        winner, loser = map(candidate_of, pair.images)
        item = [content_id(prompt, str(winner))]
        noise = keyed.normal(keyed.make_keys(3, Stream.CANDIDATE_NOISE, item), (4, 8, 8))
        mask = PromptMask(keyed.make_keys(3, Stream.PROMPT_MASK, item), [share])
        for candidate, masked in ((winner, None), (loser, mask)):
            [image] = tiny_backbone.sample(
                tiny_backbone.denoiser, [prompt], noise, steps=2, guidance=2.0, mask=masked
            )
            # One step of 256 where arithmetic depends on the batch.
            difference = np.asarray(image).astype(int) - np.asarray(kept[candidate])
            assert np.abs(difference).max() <= 1


def ranker(recipe: Callable[..., Recipe], *overrides: str) -> MaskedRanker:
    return MaskedRanker(recipe(*MASKED, *overrides))


def parts_of(ranker: MaskedRanker) -> CandidateParts:
    return CandidateParts(["tree"], CandidateSet(Path(), {"count": ranker.count}), (16, 16))


def test_a_larger_budget_keeps_the_pairs_of_a_smaller_one(tiny_recipe):
    def pairs(*overrides: str) -> set[int]:
        one = ranker(tiny_recipe, *overrides)
        _, made = one.rank(parts_of(one))
        return set(made.pairs["id"].tolist())

    small, large = pairs("curriculum.pairs_per_prompt_per_tier=1"), pairs()
    assert len(small) == 3 and len(large) == 9 and small < large
    every = pairs("curriculum.pairs_per_prompt_per_tier=50")
    assert len(every) == WINNERS * len(SHARES) and large < every


def test_losers_have_noise_of_their_own_where_the_recipe_says_so(tiny_recipe):
    shared = ranker(tiny_recipe).starts("tree")
    own = ranker(tiny_recipe, "prepare.source.same_noise=false").starts("tree")
    assert len(shared) == len(own) == PER_PROMPT
    assert {start.noise for start in shared} == {str(winner) for winner in range(WINNERS)}
    assert len({start.noise for start in own}) == PER_PROMPT
    assert [(s.masked, s.mask) for s in shared] == [(s.masked, s.mask) for s in own]
    assert Counter(start.masked for start in own) == {0.0: WINNERS, **dict.fromkeys(SHARES, BUDGET)}


def test_the_sheet_shows_a_winner_and_its_losers(tiny_recipe):
    every = ranker(tiny_recipe, "curriculum.pairs_per_prompt_per_tier=4")
    scores, made = every.rank(parts_of(every))
    shown = every.shown(scores, made.pairs)
    assert shown[0] < WINNERS and len(shown) == 1 + len(SHARES)
    assert sorted(scores[0, shown].tolist()) == pytest.approx([-0.9, -0.5, -0.1, 0])
    winners = [start.mask or start.noise for start in every.starts("tree")]
    assert len({winners[candidate] for candidate in shown}) == 1


def test_the_head_of_the_terminal_says_how_they_are_ranked(plain, tiny_recipe, ranks, terminal):
    said = dict(Preparation(ranks, tiny_recipe(f"run_dir={plain}", *MASKED), terminal).describe())
    assert said["sample"].startswith("7 prompts x (4 winners + 9 losers), 2 steps")
    assert said["rank by"].startswith("masked prompts: losers with 0.9, 0.5, 0.1 of")


# --------------------------------------------------------------------------------------------------
# The three verbs


def masked_world(folder: Path, family: str) -> Path:
    """Recipe of a tiny world with masked prompts, run in `folder/run`."""
    recipe = tiny.build(folder, family)
    recipe["prepare"] |= {"candidates_per_prompt": WINNERS, "contact_sheet_prompts": 1}
    recipe["prepare"]["source"] = {"type": "masked", "fractions": list(SHARES)}
    recipe["curriculum"]["pairs_per_prompt_per_tier"] = BUDGET
    return tiny.write_recipe(folder / "recipe.yaml", recipe)


@pytest.mark.slow
@pytest.mark.long
def test_two_ranks_of_which_one_is_killed_make_the_shards_of_one(
    plain, server, tiny_world, tmp_path
):
    path, mine = tiny_world / "recipe.yaml", [f"run_dir={tmp_path / 'run'}", *MASKED]
    for place in ("prepare.candidates@2", "prepare.shard@2"):
        failpoint = {"CDPO_FAILPOINT": f"{place}:kill/rank1"}
        assert KILLED in server.run("prepare", path, mine, ranks=2, env=failpoint).codes
    server.run("prepare", path, mine, ranks=2).succeeded()
    for part in ("candidates", "shards"):
        assert contents(tmp_path / "run" / part) == contents(plain / part)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd", pytest.param("lcm", marks=pytest.mark.long)])
def test_from_masked_prompts_to_report(family, server, tmp_path):
    path, run = masked_world(tmp_path, family), tmp_path / "run"
    four = ["train.steps=4", "curriculum.steps_per_tier=1", "train.optimizer.lr=1e-2"]
    four += ["train.sample_every=0"]
    for verb in ("prepare", "train", "compare"):
        server.run(verb, path, four).succeeded()
    found = losses(run)
    assert found[0] == pytest.approx(math.log(2), abs=1e-6)
    assert len(set(found)) == 4 and all(map(math.isfinite, found))
    results = json.loads((run / "compare" / "results.json").read_text())
    assert len(results["prompt_sets"]) == 2
