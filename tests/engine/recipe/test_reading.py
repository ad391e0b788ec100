import json
import os
import textwrap
from pathlib import Path

import pytest
from cdpo.engine.basics.errors import EXIT_USAGE, OutsideError, RecipeError
from cdpo.engine.recipe import Recipe, reading
from cdpo.engine.recipe.command_line import parse_command_line
from cdpo.engine.recipe.identity import (
    CHANGEABLE,
    diff_identity,
    recipe_hash,
    refuse_unchangeable,
    save_resolved,
    training_identity,
)
from cdpo.engine.recipe.keys import KNOBS, SCHEMA, nearest_key
from cdpo.engine.recipe.reading import load_recipe
from cdpo.engine.recipe.reference import for_terminal
from cdpo.engine.recipe.yaml_subset import Source
from cdpo.engine.sources.prompts import read_prompts
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from refusals import refused

ROOT = Path(__file__).parents[3]
MINIMAL = """\
run_dir: runs/x
model: {path: some/model}
prompts: {train: prompts.txt}
reward: {path: some/reward}
"""


@pytest.fixture
def write(tmp_path):
    """Write a recipe file, by default the smallest valid one, and return its path."""

    def write(text: str = MINIMAL, extra: str = "") -> Path:
        path = tmp_path / "r.yaml"
        path.write_text(text + textwrap.dedent(extra), encoding="utf-8")
        return path

    return write


def problems(path: Path | str, overrides: tuple[str, ...] = ()) -> dict[str, str]:
    """Kind by key of what is wrong, of which each has one line that begins with its place."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    error = caught.value
    assert error.exit_code == EXIT_USAGE
    found = error.problems or ((error.key, error.kind, str(error)),)
    assert str(error).splitlines() == [text for _, _, text in found]
    assert (error.key, error.kind) == found[0][:2]
    return {key: kind for key, kind, _ in found}


def places(path: Path) -> list[str]:
    """What stands between the file's name and the first colon of each line: its number."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    lines = str(caught.value).splitlines()
    return [line.removeprefix(str(path)).partition(": ")[0] for line in lines]


def flatten(values: dict, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in values.items():
        inside = isinstance(value, dict) and value  # an empty one is a knob's own value
        found |= flatten(value, f"{prefix}{key}.") if inside else {prefix + key: value}
    return found


# --------------------------------------------------------------------------------------------------
# Reading


def test_a_minimal_recipe_has_the_defaults_of_the_schema(write):
    recipe = load_recipe(write())
    assert recipe.model.path == "some/model"
    assert recipe.train.steps == 10_000
    assert recipe.compare.judge is None


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml")))
def test_shipped_recipes_are_short_and_say_nothing_twice(name, monkeypatch):
    """They hold what differs from the defaults; a reward may name the default `type` though."""
    monkeypatch.chdir(ROOT)
    path = Path("recipes") / f"{name}.yaml"
    recipe = load_recipe(path)
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 100
    assert lines[0] == "# yaml-language-server: $schema=schema.json"
    assert f"engine/train.py   --recipe {path}" in text
    given = {key: value for key, value in flatten(Source("").read(text)).items() if key in SCHEMA}
    same = {key for key, value in given.items() if SCHEMA[key].get_default() == value}
    assert same <= {"reward.type", "compare.judge.type"}
    assert recipe.run_dir == f"runs/{name}"
    assert any(read_prompts(recipe.prompts, recipe.seed))
    assert (ROOT / "ds_configs" / f"{recipe.deepspeed}.json").is_file()


def test_what_must_be_given_is_enough_for_the_published_run():
    whole = load_recipe(ROOT / "recipes" / "sd15_cdpo.yaml")
    given = {key: getattr(whole, key) for key in ("run_dir", "model", "prompts", "reward")}
    least = Recipe.model_validate(given)
    assert recipe_hash(least) == recipe_hash(whole)
    assert least.prepare.model_copy(update={"batch_size": 32}) == whole.prepare


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),  # text to PyYAML, for want of a point
        ("1E-4", 1e-4),
        (".5", 0.5),
        ("+2.5e+1", 25.0),
        ("3", 3.0),
        ("007", 7.0),  # octal in YAML 1.1
    ],
)
def test_numbers_are_those_of_yaml_1_2(write, text, value):
    recipe = load_recipe(write(extra=f"train: {{optimizer: {{lr: {text}}}}}\n"))
    assert recipe.train.optimizer.lr == value


@pytest.mark.parametrize("text", ["no", "on", "1:30", "2020-01-01", "1_000", "0x10", "<<", "="])
def test_what_yaml_1_1_would_convert_stays_text(write, text):
    assert load_recipe(write(), [f"model.revision={text}"]).model.revision == text


def test_unknown_keys_name_file_line_key_and_the_nearest_valid_key(write):
    path = write(extra="train:\n  stpes: 3\nlanes: 2\nobjective: {lr: 1e-4}\n")
    unknown = ["objective.lr", "train.stpes", "lanes"]
    assert problems(path) == dict.fromkeys(unknown, "unknown")
    assert places(path) == [":8", ":6", ":7"]
    meant = ["train.optimizer.lr", "train.steps", "data.lanes"]
    assert [nearest_key(key) for key in unknown] == [f"did you mean {key}?" for key in meant]
    assert nearest_key("checkpoint.zzzz") == "valid keys: checkpoint.every, checkpoint.keep"


def test_all_problems_of_file_and_overrides_are_said_at_once(write):
    path = write("seed: -1\nmodel: {path: 5}\ntrain: {precision: fp8}\n")
    overrides = ("train.stepz=1", "train.max_skipped=abc", "nonsense")
    assert problems(path, overrides) == {
        "train.stepz": "unknown",
        "nonsense": "unreadable",
        "run_dir": "missing",
        "seed": "out-of-range",
        "model.path": "wrong-type",
        "prompts": "missing",
        "reward": "missing",
        "train.precision": "unknown",
        "train.max_skipped": "wrong-type",
    }
    with refused(RecipeError, "unknown", "train.stepz", wording="recipe-problems"):
        load_recipe(path, overrides)


@pytest.mark.parametrize(
    ("extra", "key", "kind"),
    [
        ("seed: true", "seed", "wrong-type"),
        ("seed: '3'", "seed", "wrong-type"),
        ("seed: 3.0", "seed", "wrong-type"),
        ("train:", "train", "wrong-type"),
        ("train: [1]", "train", "wrong-type"),
        ("curriculum: {cumulative: yes}", "curriculum.cumulative", "wrong-type"),
        ("train: {optimizer: {lr: .nan}}", "train.optimizer.lr", "non-finite"),
        ("train: {optimizer: {betas: [0.9, 2]}}", "train.optimizer.betas[1]", "out-of-range"),
        ("train: {optimizer: {betas: [0.9]}}", "train.optimizer.betas[1]", "missing"),
        ("train: {global_batch: 30}", None, "contradiction"),
        ("objective: {type: consistency_dpo}", None, "contradiction"),
    ],
)
def test_mistyped_values_are_refused_where_they_stand(write, extra, key, kind):
    path = write(extra=extra)
    assert problems(path) == {key or str(path): kind}
    assert places(path) == [":5" if key else ""]


# --------------------------------------------------------------------------------------------------
# Hostile and broken files


@pytest.mark.parametrize(
    ("extra", "wrong", "lines"),
    [
        (
            "train:\n  steps: 1\n  steps: 2\nseed: 1\nseed: 2\n",
            {"train.steps": "duplicate", "seed": "duplicate"},
            [":6", ":8"],
        ),
        ("train.steps: 5\ntrain: {steps: 6}\n", {"train.steps": "unsupported"}, [":5"]),
    ],
    ids=["given twice", "dotted, as on the command line"],
)
def test_keys_that_are_refused_where_they_stand(write, extra, wrong, lines):
    path = write(extra=extra)
    assert problems(path) == wrong
    assert places(path) == lines


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("a: &x 1\nb: *x\n", "unsupported"),
        ("a: !!python/object/apply:os.system [ls]\n", "unsupported"),
        ("a: !!binary aGk=\n", "unsupported"),
        ("[" * 50_000, "unsupported"),
        ("{a: " * 50_000, "unsupported"),
        ("a: [1\n", "damaged"),
        ("a: 1\n---\nb: 2\n", "damaged"),
        ("a: 1\n\tb: 2\n", "damaged"),
        ('a: "\\UFFFFFFFF"\n', "damaged"),
        ("a: \0\n", "damaged"),
        ("? [1, 2]\n: 3\n", "wrong-type"),
        ("", "empty"),
        ("# nothing\n", "empty"),
        ("- run_dir\n", "wrong-type"),
        ("run_dir\n", "wrong-type"),
    ],
)
def test_files_that_are_no_recipe_are_refused_at_once(write, text, kind):
    path = write(text)
    with refused(RecipeError, kind, str(path)) as caught:
        load_recipe(path)
    if text.startswith("a: 1\n\t"):
        assert "line 2, column 1: " in str(caught.value)


def test_an_alias_bomb_is_refused_before_it_expands(write):
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for level in range(1, 10):
        bomb += f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n"
    path = write(bomb)
    with refused(RecipeError, "unsupported", str(path), wording="recipe-with-aliases"):
        load_recipe(path)


def test_numbers_beyond_pythons_digit_limit_are_refused(write):
    path = write(extra="seed: " + "9" * 5000 + "\n")
    with refused(RecipeError, "out-of-range", "seed") as caught:
        load_recipe(path)
    assert len(str(caught.value)) < 300


def test_values_and_keys_cannot_forge_lines(write):
    path = write(extra='"a\\nb": 1\nseed: "1\\nrecipe ok"\n')
    assert problems(path) == {"seed": "wrong-type", "a\nb": "unknown"}


def test_huge_missing_and_unreadable_files_are_refused(tmp_path, write):
    big = write(extra="#" * reading.MAX_BYTES)
    absent = tmp_path / "absent.yaml"
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"run_dir: caf\xe9\n")
    for path, kind in (
        (big, "too-large"),
        (absent, "missing"),
        (tmp_path, "wrong-type"),
        (tmp_path / "fifo.yaml", "wrong-type"),
        (tmp_path / "latin.yaml", "unreadable"),
        ("nul\0.yaml", "missing"),
    ):
        with refused(RecipeError, kind, str(path)) as caught:
            load_recipe(path)
        assert (str(big) in str(caught.value)) == (path in (big, absent, tmp_path / "fifo.yaml"))


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert load_recipe(path).run_dir == "runs/x"


# --------------------------------------------------------------------------------------------------
# Overrides


def test_overrides_reach_every_depth_and_the_last_one_wins(write):
    overrides = [
        "train.optimizer.lr=1e-4",
        "model.resolution=[32, 48]",
        "model.vae=null",
        "adapter.targets=[to_q]",
        "curriculum.cumulative=false",
        "compare.judge.path=judge",
        "seed=1",
        "seed=2",
    ]
    recipe = load_recipe(write(), overrides)
    assert recipe.train.optimizer.lr == 1e-4
    assert recipe.model.resolution == (32, 48)
    assert recipe.adapter.targets == ("to_q",)
    assert not recipe.curriculum.cumulative
    assert recipe.compare.judge is not None and recipe.compare.judge.path == "judge"
    assert recipe.seed == 2


def test_an_override_can_take_back_what_the_file_gives(write):
    path = write(extra="compare: {judge: {path: j}}\n")
    assert load_recipe(path, ["compare.judge=null"]).compare.judge is None


@pytest.mark.parametrize(
    ("override", "key", "kind"),
    [
        ("train.steps", "train.steps", "unreadable"),
        ("=3", "", "unknown"),
        ("train.steps=[", "train.steps", "damaged"),
        ("train.steps=&a 1", "train.steps", "unsupported"),
        ("train={steps: 3}", "train", "wrong-type"),
        ("train=3", "train", "wrong-type"),
        ("run_dir=", "run_dir", "wrong-type"),
        ("model.resolution=[1,x]", "model.resolution[1]", "wrong-type"),
        ("model.resolution.0=3", "model.resolution.0", "unknown"),
        ("adapter.ema=1.0", "adapter.ema", "out-of-range"),
        *(
            (f"adapter.targets={targets}", "adapter.targets", "unknown")
            for targets in ("attn", "to_q", "[]", "[to_q, 3]", "5", "null")
        ),
    ],
)
def test_bad_overrides_are_named_by_their_text(write, override, key, kind):
    with refused(RecipeError, kind, key) as caught:
        load_recipe(write(), [override])
    assert str(caught.value).startswith(f"override {override!r}: ")


@pytest.mark.parametrize("train", ["3", "[1]"])
def test_an_override_does_not_hide_that_the_file_has_no_section_there(write, train):
    assert problems(write(extra=f"train: {train}\n"), ("train.steps=5",)) == {"train": "wrong-type"}


@pytest.mark.parametrize("targets", ["attention", "attention+ff", "all-linear", "lcm"])
def test_targets_are_a_preset_or_a_list(write, targets):
    assert load_recipe(write(), [f"adapter.targets={targets}"]).adapter.targets == targets


@pytest.mark.parametrize(
    "overrides",
    [
        ["adapter.type=full"],
        ["adapter.type=full", "export.formats=[merged]", "adapter.dora=true"],
        ["adapter.dora=true", "export.formats=[diffusers, kohya]"],
        ["export.formats=[]"],
        ["compare.weights=ema"],
        ["evaluate.stop=2"],
        ["export.of=best"],
        ["evaluate.every=100"],  # on which prompts?
    ],
)
def test_exports_averages_and_evaluations_that_cannot_be_are_refused(write, overrides):
    path = write()
    assert problems(path, tuple(overrides)) == {str(path): "contradiction"}


@pytest.mark.parametrize(
    "value", ["${oc.env:HOME}", "${seed}", "a${", "\\${x}", "${oc.env:X,${y}}"]
)
def test_interpolations_are_refused_in_files_and_overrides(write, value, monkeypatch):
    monkeypatch.setenv("HOME", "/secret")
    for key, text, overrides in (
        ("model.path", MINIMAL, [f"model.path={json.dumps(value)}"]),
        ("run_dir", MINIMAL.replace("runs/x", json.dumps(value)), []),
    ):
        wording = "recipe-with-interpolation" if value == "${oc.env:HOME}" and overrides else None
        with refused(RecipeError, "unsupported", key, wording=wording) as caught:
            load_recipe(write(text), overrides)
        assert "/secret" not in str(caught.value)


# --------------------------------------------------------------------------------------------------
# Never anything but a Recipe or a RecipeError

SETTINGS = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["1e-4", "${x}", "???", "[", "!!str", "*a", "auto", "fp16"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


def recipe_or_error(folder: Path, file: bytes, *overrides: str) -> Recipe | None:
    path = folder / "fuzz.yaml"
    path.write_bytes(file)
    try:
        return load_recipe(path, overrides)
    except RecipeError as error:
        assert str(error).strip()
        return None


@SETTINGS
@given(raw=st.binary(max_size=200))
@example(b"%YAML 9.9\n---\na: 1")
@example(b"\xff\xfea\x00:\x00")
def test_any_bytes_give_a_recipe_or_a_recipe_error(tmp_path, raw):
    recipe_or_error(tmp_path, raw)


@SETTINGS
@given(text=st.text(alphabet="ab:-[]{}&*!?|>'\"%@`,#=.~<$ \n\t\\0x1eE+", max_size=80))
def test_any_yaml_like_text_gives_a_recipe_or_a_recipe_error(tmp_path, text):
    recipe_or_error(tmp_path, (MINIMAL + text).encode(), f"model.path={text}")


@SETTINGS
@given(key=st.sampled_from(sorted(SCHEMA)), value=VALUES, spelled=st.booleans())
def test_any_value_at_any_key_gives_a_recipe_or_a_recipe_error(tmp_path, key, value, spelled):
    text = json.dumps(value) if spelled else value
    recipe = recipe_or_error(tmp_path, MINIMAL.encode(), f"{key}={text}")
    if recipe is not None:
        save_resolved(recipe, tmp_path / "resolved.yaml")
        assert load_recipe(tmp_path / "resolved.yaml") == recipe


@SETTINGS
@given(argument=st.text(max_size=30))
def test_any_override_gives_a_recipe_or_a_recipe_error(tmp_path, argument):
    recipe_or_error(tmp_path, MINIMAL.encode(), argument)


# --------------------------------------------------------------------------------------------------
# Saving


@SETTINGS
@given(
    text=st.one_of(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40),
        st.sampled_from(
            ["1e-4", "no", "null", "~", "007", "1:30", " a ", "a: b", "#", "é\n\u2028"]
        ),
    ).filter(lambda text: "${" not in text),
    lr=st.floats(min_value=1e-44, max_value=1e38),
)
def test_a_resolved_recipe_reads_back_equal(tmp_path, text, lr):
    recipe = Recipe.model_validate(
        {
            "run_dir": text,
            "model": {"path": text, "vae": text},
            "prompts": {"train": text},
            "reward": {"path": text},
            "train": {"optimizer": {"lr": lr}},
        }
    )
    path = tmp_path / "resolved.yaml"
    save_resolved(recipe, path)
    again = load_recipe(path)
    assert again == recipe
    assert recipe_hash(again) == recipe_hash(recipe)


def test_a_resolved_recipe_shows_every_knob_and_leaves_nothing_else_behind(tmp_path, write):
    recipe = load_recipe(write(), ["compare.judge.path=j", "evaluate.sampler.steps=4"])
    path = tmp_path / "deep" / "run" / "recipe.yaml"
    save_resolved(recipe, path)
    save_resolved(recipe, path)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# The recipe of this run")
    assert flatten(Source("").read(text)).keys() == set(KNOBS)
    assert [p.name for p in path.parent.iterdir()] == ["recipe.yaml"]


def test_a_failed_save_keeps_the_old_file(tmp_path, write, fill_disk):
    recipe = load_recipe(write())
    path = tmp_path / "out" / "recipe.yaml"
    save_resolved(recipe, path)
    before = path.read_bytes()
    fill_disk()
    with refused(OutsideError, "unwritable", str(path)):  # the recipe is right
        save_resolved(recipe, path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["recipe.yaml"]


# --------------------------------------------------------------------------------------------------
# Identity

RUNTIME = {
    "train.reference",
    "run_dir",
    "deepspeed",
    "train.steps",
    "train.micro_batch",
    "train.kernels",
    "train.threads",
    "train.max_skipped",
    "train.log_every",
    "train.sample_every",
    "train.sample_prompts",
    "data.path",
    "data.manifest_sha256",
    "data.cache",
    "data.cache_gib",
    *(f"data.fetch.{key}" for key in ("threads", "retries", "backoff", "stall", "budget")),
    "data.pairs_per_shard",
    "data.format",
    "data.text",
    "data.workers",
}


def test_identity_holds_what_decides_the_result_and_nothing_else(write):
    """Every new knob must be sorted in here: does a resumed run have to share it?"""
    watched = ("prompts.", "reward.", "prepare.", "speed.", "checkpoint.", "monitor.", "export.")
    watched += ("cluster.", "compare.", "evaluate.", "rounds.")
    expected = {key for key in KNOBS if not key.startswith(watched)} - RUNTIME
    expected |= {"speed.frozen_cache"}  # which noise a pair meets when
    identity = training_identity(load_recipe(write()))
    assert set(identity) == expected
    assert json.loads(json.dumps(identity)) == identity


def test_identity_allows_an_extended_run_and_refuses_another_beta(write):
    old = load_recipe(write())
    longer = load_recipe(write(), ["train.steps=99999", "run_dir=elsewhere", "train.micro_batch=8"])
    other = load_recipe(write(), ["objective.beta=2000", "model.resolution=[64,64]"])
    assert recipe_hash(old) == recipe_hash(longer) != recipe_hash(other)
    assert diff_identity(training_identity(old), training_identity(longer)) == []
    assert diff_identity(training_identity(old), training_identity(other)) == [
        "model.resolution: checkpoint [512, 512], recipe [64, 64]",
        "objective.beta: checkpoint 5000, recipe 2000.0",
    ]
    assert diff_identity({"gone": 1}, {"new": "x"}) == [
        "new: checkpoint not set, recipe 'x'",
        "gone: checkpoint 1, recipe not set",
    ]


def test_a_checkpoint_older_than_a_knob_had_its_default(write):
    older = training_identity(load_recipe(write()))
    del older["model.unet"]
    assert diff_identity(older, training_identity(load_recipe(write()))) == []
    other = load_recipe(write(), ["model.unet=some/unet"])
    assert diff_identity(older, training_identity(other)) == [
        "model.unet: checkpoint null, recipe 'some/unet'"
    ]


def test_numbers_written_differently_hash_alike(write):
    spelled = [
        load_recipe(write(), [f"objective.beta={text}"]) for text in ("5000", "5e3", "5000.0")
    ]
    assert len({recipe_hash(recipe) for recipe in [*spelled, load_recipe(write())]}) == 1


# --------------------------------------------------------------------------------------------------
# Command line


@pytest.mark.parametrize(
    "before",
    [[], ["--local_rank=3"], ["--local_rank", "3"], ["--local-rank=3"], ["train.steps=7"]],
)
def test_launchers_arguments_are_ignored_wherever_they_stand(write, before):
    recipe = parse_command_line("train", [*before, "--recipe", str(write()), "seed=5"]).recipe
    assert recipe.seed == 5
    assert recipe.train.steps == (7 if before == ["train.steps=7"] else 10_000)


@pytest.mark.parametrize(
    ("arguments", "key", "kind"),
    [
        ([], "--recipe", "missing"),
        (["train.steps=3"], "--recipe", "missing"),
        (["--recipe"], None, "unsupported"),
        (["--recipe", "x.yaml", "--steps", "3"], None, "unsupported"),
        (["--rec", "x.yaml"], None, "unsupported"),
        (["--recipe", "x.yaml", "--world-size", "2"], "--world-size", "contradiction"),
        (["--recipe", "x.yaml", "--dry-run", "--world-size", "0"], "--world-size", "out-of-range"),
    ],
)
def test_usage_errors_are_recipe_errors(arguments, key, kind):
    with refused(RecipeError, kind, key):
        parse_command_line("train", arguments)


def test_a_dry_run_is_asked_for_by_a_flag_of_train_alone(write):
    asked = parse_command_line(
        "train", ["--dry-run", "--recipe", str(write()), "--world-size", "8", "seed=5"]
    )
    assert (asked.dry_run, asked.world_size, asked.recipe.seed) == (True, 8, 5)
    assert not parse_command_line("train", ["--recipe", str(write())]).dry_run
    with refused(RecipeError, "unsupported"):
        parse_command_line("prepare", ["--recipe", str(write()), "--dry-run"])


CHANGEABLE_KEYS = (
    *("train.optimizer.lr", "train.optimizer.betas", "train.optimizer.eps"),
    *("train.optimizer.weight_decay", "train.warmup_steps", "train.gradient_clip"),
    *("train.caption_dropout", "adapter.dropout", "objective.beta", "objective.distance"),
    *("objective.huber_c", "objective.loss", "objective.label_smoothing"),
    *("objective.timestep_weighting", "objective.time_weight", "objective.loser_gradient"),
    "objective.loser_safeguard",
    *("objective.pair_weighting", "objective.target_logit"),
)


@pytest.mark.parametrize("key", CHANGEABLE_KEYS)
def test_how_steps_are_taken_may_change_in_the_middle_of_a_run(write, key):
    arguments = ["seed=5", "--allow-change", key, "--recipe", str(write()), "--allow-change", key]
    asked = parse_command_line("train", arguments)
    assert (asked.allow_change, asked.recipe.seed) == ((key,), 5)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("train.optimizer.rl", "unknown"),
        ("train.optimizer", "unknown"),
        ("train.steps", "no-effect"),
        ("checkpoint.every", "no-effect"),
        *((key, "unsupported") for key in ("seed", "data.lanes", "curriculum.tiers")),
        *((key, "unsupported") for key in ("train.global_batch", "train.precision", "model.path")),
        *((key, "unsupported") for key in ("adapter.rank", "adapter.ema", "objective.type")),
    ],
)
def test_what_else_may_not(write, key, kind):
    wording = {"adapter.rank": "allow-change.shape", "train.steps": "allow-change.anyway"}.get(key)
    with refused(RecipeError, kind, key, wording=wording):
        parse_command_line("train", ["--recipe", str(write()), "--allow-change", key])


def test_a_dry_run_reads_no_checkpoint_that_could_differ(write):
    arguments = ["--recipe", str(write()), "--dry-run", "--allow-change", "objective.beta"]
    with refused(RecipeError, "no-effect", "--allow-change"):
        parse_command_line("train", arguments)


def test_every_key_of_a_run_may_change_or_has_a_reason_why_not(tiny_recipe):
    keys = training_identity(tiny_recipe()).keys()
    assert set(filter(CHANGEABLE.fullmatch, keys)) == set(CHANGEABLE_KEYS)
    for key in keys - set(CHANGEABLE_KEYS):
        with refused(RecipeError, "unsupported", key):
            refuse_unchangeable(key)


def test_a_run_of_another_verb_has_nothing_to_change(write):
    with refused(RecipeError, "unsupported"):
        parse_command_line("prepare", ["--recipe", str(write()), "--allow-change", "seed"])


def test_help_lists_every_knob_with_its_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_command_line("prepare", ["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: deepspeed engine/prepare.py --recipe")
    assert for_terminal() in shown
    for key in KNOBS:
        assert f"\n  {key} = " in shown
        assert SCHEMA[key].description, f"{key} has no docstring"
