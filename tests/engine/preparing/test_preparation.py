"""Stage 1 over any parts: only what decides the shards makes them stale; a kill loses nothing."""

from collections import Counter
from collections.abc import Sequence

import pytest
import tiny
from cdpo.engine.preparing import candidates, latents, scores, shard_set
from cdpo.engine.preparing.imported import SourceParts
from cdpo.engine.preparing.sampled import CandidateParts
from cdpo.engine.recipe import Model
from prepared import DECIDED, contents, is_finished, prepare

# Records that are loaded once to be scored, unless masks rank them, and once to be encoded.
LOADED = {
    "sampled": 2 * len(tiny.PROMPTS),
    "masked": len(tiny.PROMPTS),
    "paired": 2 * len(DECIDED),
}


@pytest.mark.parametrize(
    ("kind", "override", "finished"),
    [
        ("sampled", "seed=3", True),  # as it is
        ("sampled", "seed=4", False),
        ("sampled", "reward.path=JUDGE", False),
        ("sampled", "curriculum.tiers=2", False),
        ("sampled", "curriculum.min_score_gap=0.1", False),
        ("sampled", "prepare.sampler.steps=3", False),
        ("sampled", "data.lanes=1", False),
        ("sampled", "prompts.limit=3", False),
        ("sampled", "train.steps=99", True),
        ("sampled", "curriculum.order=random", True),
        ("sampled", "prepare.batch_size=3", True),
        ("sampled", "reward.batch_size=3", True),
        ("masked", "prepare.source.fractions=[0.9, 0.5, 0.2]", False),
        ("masked", "prepare.source.same_noise=false", False),
        ("masked", "curriculum.pairs_per_prompt_per_tier=2", False),
        ("masked", "seed=4", False),
        ("masked", "reward.path=elsewhere", True),
        ("masked", "curriculum.order=random", True),
        ("paired", "seed=4", False),
        ("paired", "reward.path=JUDGE", False),
        ("paired", "curriculum.tiers=2", False),
        ("paired", "prepare.source.on_disagreement=drop", False),
        ("paired", "prepare.source.limit=50", False),
        ("paired", "train.steps=99", True),
        ("paired", "prepare.sampler.steps=3", True),
        ("paired", "prepare.source.max_unreadable=3", True),
        ("paired", "prompts.train=null", True),
    ],
)
def test_only_what_decides_the_shards_makes_them_stale(
    made, load, ranks, tiny_world, kind, override, finished
):
    override = override.replace("JUDGE", str(tiny_world / "judge"))
    run_dir = made(kind)
    before = contents(run_dir / "source") if kind == "paired" else {}
    assert is_finished(load(kind, run_dir, override), ranks) == finished
    for name, data in before.items():
        (run_dir / "source" / name).write_bytes(data)


class LaterModel(Model):
    """With a key that came after the set was made."""

    came_later: str | None = None


@pytest.mark.parametrize(("value", "finished"), [(None, True), ("given", False)])
def test_a_key_that_came_later_is_not_another_recipe(made, load, ranks, value, finished):
    recipe = load("sampled", made("sampled"))
    later = LaterModel(**recipe.model.model_dump(), came_later=value)
    assert is_finished(recipe.model_copy(update={"model": later}), ranks) == finished


@pytest.mark.parametrize(
    ("kind", "module", "place", "passage"),
    [
        ("sampled", candidates, "prepare.candidates", 3),
        ("sampled", scores, "prepare.part", 2),
        ("sampled", scores, "prepare.scored", 1),
        ("sampled", latents, "prepare.latents", 2),
        ("sampled", shard_set, "prepare.shard", 4),
        ("masked", candidates, "prepare.candidates", 3),
        ("paired", scores, "prepare.part", 2),
        ("paired", latents, "prepare.latents", 3),
        pytest.param("paired", scores, "prepare.scored", 1, marks=pytest.mark.long),
        pytest.param("paired", shard_set, "prepare.shard", 4, marks=pytest.mark.long),
    ],
)
def test_killed_at_a_fail_point_and_started_again(
    made, load, ranks, tmp_path, monkeypatch, kind, module, place, passage
):
    """The same bytes, and nothing is scored or encoded twice."""
    whole = contents(made(kind) / "shards")
    passages: Counter[str] = Counter()
    loaded: list[int] = []

    def die(name: str) -> None:
        passages[name] += 1
        if (name, passages[name]) == (place, passage):
            raise KeyboardInterrupt

    for parts in (CandidateParts, SourceParts):
        original = parts.load

        def counted(self, part: int, records: Sequence[int], original=original):
            loaded.append(len(records))
            return original(self, part, records)

        monkeypatch.setattr(parts, "load", counted)
    recipe = load(kind, tmp_path / "run", "prepare.contact_sheet_prompts=0")
    with monkeypatch.context() as patch:
        patch.setattr(module, "failpoint", die)
        with pytest.raises(KeyboardInterrupt):
            prepare(recipe, ranks)
    assert not (tmp_path / "run" / "shards" / "manifest.json").exists()
    assert contents(prepare(recipe, ranks)) == whole
    assert sum(loaded) == LOADED[kind]
