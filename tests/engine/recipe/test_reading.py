import json
import os
import textwrap
from pathlib import Path

import pytest
from cdpo.engine.basics.errors import EXIT_USAGE, RecipeError
from cdpo.engine.recipe import Recipe, reading
from cdpo.engine.recipe.command_line import describe_schema, parse_command_line
from cdpo.engine.recipe.identity import diff_identity, recipe_hash, save_resolved, training_identity
from cdpo.engine.recipe.keys import KNOBS, SCHEMA
from cdpo.engine.recipe.reading import load_recipe
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


def problems(path: Path | str, overrides: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == EXIT_USAGE
    return str(caught.value).splitlines()


def flatten(values: dict, prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for key, value in values.items():
        inside = isinstance(value, dict) and value  # an empty one is a knob's own value
        keys |= flatten(value, f"{prefix}{key}.") if inside else {prefix + key}
    return keys


# --------------------------------------------------------------------------------------------------
# Reading


def test_a_minimal_recipe_has_the_defaults_of_the_schema(write):
    recipe = load_recipe(write())
    assert recipe.model.path == "some/model"
    assert recipe.train.steps == 10_000
    assert recipe.compare.judge is None


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml")))
def test_shipped_recipes_are_valid_and_show_every_knob(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = Path("recipes") / f"{name}.yaml"
    recipe = load_recipe(path)
    given_keys = flatten(Source("").read(path.read_text(encoding="utf-8")))
    given_keys |= {key for key in KNOBS for given in given_keys if given.startswith(f"{key}.")}
    knobs = set(KNOBS) | flatten({"prepare": {"source": recipe.prepare.source.model_dump()}})
    assert knobs - given_keys <= set(), "knobs the recipe does not show"
    assert f"engine/train.py   --recipe {path}" in path.read_text(encoding="utf-8")
    assert recipe.run_dir == f"runs/{name}"
    assert any(read_prompts(recipe.prompts, recipe.seed))
    assert Path(recipe.deepspeed).is_file()


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
    assert problems(path) == [
        f"{path}:8: objective.lr: unknown key; did you mean train.optimizer.lr?",
        f"{path}:6: train.stpes: unknown key; did you mean train.steps?",
        f"{path}:7: lanes: unknown key; did you mean data.lanes?",
    ]


def test_an_unknown_key_like_no_other_lists_what_is_valid_there(write):
    [line] = problems(write(extra="checkpoint: {zzzz: 1}\n"))
    assert line.endswith("valid keys: checkpoint.every, checkpoint.keep")


def test_all_problems_of_file_and_overrides_are_said_at_once(write):
    path = write("seed: -1\nmodel: {path: 5}\ntrain: {precision: fp8}\n")
    lines = problems(path, ("train.stepz=1", "train.max_skipped=abc", "nonsense"))
    assert lines == [
        "override 'train.stepz=1': unknown key; did you mean train.steps?",
        "override 'nonsense': write it as dotted.key=value, e.g. train.steps=200",
        f"{path}: run_dir: missing: Folder of everything this run writes.",
        f"{path}:1: seed: -1 should be greater than or equal to 0",
        f"{path}:2: model.path: 5 should be a valid string: put it in quotes",
        f"{path}: prompts: missing: Prompts, for training and held out.",
        f"{path}: reward: missing: The reward that ranks candidates.",
        f"{path}:3: train.precision: 'fp8' should be 'fp32', 'bf16' or 'fp16'",
        "override 'train.max_skipped=abc': train.max_skipped: 'abc' should be a valid integer",
    ]


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("seed: true", ":5: seed: true should be a valid integer"),
        ("seed: '3'", ":5: seed: '3' should be a valid integer"),
        ("seed: 3.0", ":5: seed: 3.0 should be a valid integer, such as 3"),
        ("train:", ":5: train: null should be a section, with keys of its own below it"),
        ("train: [1]", ":5: train: [1] should be a section, with keys of its own below it"),
        ("curriculum: {cumulative: yes}", "curriculum.cumulative: 'yes' should be a valid boolean"),
        ("train: {optimizer: {lr: .nan}}", "lr: NaN should be a finite number"),
        ("train: {optimizer: {betas: [0.9, 2]}}", "betas[1]: 2 should be less than or equal to 1"),
        ("train: {optimizer: {betas: [0.9]}}", "train.optimizer.betas[1]: missing"),
        ("train: {global_batch: 30}", "train.global_batch=30 is not a multiple of data.lanes=8"),
        ("objective: {type: consistency_dpo}", "lcm is trained with consistency_dpo"),
    ],
)
def test_mistyped_values_are_refused_and_shown(write, extra, expected):
    [line] = problems(write(extra=extra))
    assert expected in line


# --------------------------------------------------------------------------------------------------
# Hostile and broken files


def test_duplicate_keys_are_refused_with_both_lines(write):
    path = write(extra="train:\n  steps: 1\n  steps: 2\nseed: 1\nseed: 2\n")
    assert problems(path) == [
        f"{path}:6: train.steps: given again on line 7: keep one of the two",
        f"{path}:8: seed: given again on line 9: keep one of the two",
    ]


def test_dotted_keys_belong_on_the_command_line(write):
    [line] = problems(write(extra="train.steps: 5\ntrain: {steps: 6}\n"))
    assert ":5: 'train.steps': dots are for the command line" in line


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: &x 1\nb: *x\n", "anchors and aliases are not taken"),
        ("a: !!python/object/apply:os.system [ls]\n", "os.system is not taken"),
        ("a: !!binary aGk=\n", "binary is not taken"),
        ("[" * 50_000, "nested too deep"),
        ("{a: " * 50_000, "nested too deep"),
        ("a: [1\n", "line 2, column 1: "),
        ("a: 1\n---\nb: 2\n", "but found another document"),
        ("a: 1\n\tb: 2\n", "line 2, column 1: "),
        ('a: "\\UFFFFFFFF"\n', "not YAML"),
        ("a: \0\n", "special characters are not allowed"),
        ("? [1, 2]\n: 3\n", "line 1: a key must be a word"),
        ("", "is empty; it should be keys and values"),
        ("# nothing\n", "is empty"),
        ("- run_dir\n", "is a list"),
        ("run_dir\n", "is one value"),
    ],
)
def test_files_that_are_no_recipe_are_refused_at_once(write, text, reason):
    assert reason in problems(write(text))[0]


def test_an_alias_bomb_is_refused_before_it_expands(write):
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for level in range(1, 10):
        bomb += f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n"
    [line] = problems(write(bomb))
    assert "anchors and aliases are not taken" in line


def test_numbers_beyond_pythons_digit_limit_are_refused(write):
    [line] = problems(write(extra="seed: " + "9" * 5000 + "\n"))
    assert "has too many digits" in line
    assert len(line) < 300


def test_values_and_keys_cannot_forge_lines(write):
    lines = problems(write(extra='"a\\nb": 1\nseed: "1\\nrecipe ok"\n'))
    assert len(lines) == 2


def test_huge_missing_and_unreadable_files_are_refused(tmp_path, write):
    big = write(extra="#" * reading.MAX_BYTES)
    assert "is larger than 256 KiB" in problems(big)[0]
    assert f"does not exist; there are {big}" in problems(tmp_path / "absent.yaml")[0]
    assert "is not a file" in problems(tmp_path)[0]
    os.mkfifo(tmp_path / "fifo.yaml")
    assert "is not a file" in problems(tmp_path / "fifo.yaml")[0]
    (tmp_path / "latin.yaml").write_bytes(b"run_dir: caf\xe9\n")
    assert "not UTF-8" in problems(tmp_path / "latin.yaml")[0]
    assert "does not exist" in problems("nul\0.yaml")[0]


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
    ("override", "expected"),
    [
        ("train.steps", "write it as dotted.key=value"),
        ("=3", "unknown key"),
        ("train.steps=[", "not YAML that can be read here"),
        ("train.steps=&a 1", "anchors and aliases are not taken"),
        ("train={steps: 3}", "set the keys of a section one by one"),
        ("train=3", "train: 3 should be a section"),
        ("run_dir=", "run_dir: null should be a valid string"),
        ("model.resolution=[1,x]", "model.resolution[1]: 'x' should be a valid integer"),
        ("model.resolution.0=3", "unknown key; did you mean model.resolution?"),
    ],
)
def test_bad_overrides_are_named_by_their_text(write, override, expected):
    [line] = problems(write(), (override,))
    assert line.startswith(f"override {override!r}: ")
    assert expected in line


@pytest.mark.parametrize("train", ["3", "[1]"])
def test_an_override_does_not_hide_that_the_file_has_no_section_there(write, train):
    [line] = problems(write(extra=f"train: {train}\n"), ("train.steps=5",))
    assert f"train: {train} should be a section" in line


@pytest.mark.parametrize("targets", ["attention", "attention+ff", "all-linear", "lcm"])
def test_targets_are_a_preset_or_a_list(write, targets):
    assert load_recipe(write(), [f"adapter.targets={targets}"]).adapter.targets == targets


@pytest.mark.parametrize("targets", ["attn", "to_q", "[]", "[to_q, 3]", "5", "null"])
def test_other_targets_are_refused_in_one_line_with_what_there_is(write, targets):
    [line] = problems(write(), (f"adapter.targets={targets}",))
    assert "should be attention, attention+ff, all-linear, lcm, or a list of layer names" in line


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["adapter.type=full"], "export.formats=[diffusers] does not go with adapter.type=full"),
        (
            ["adapter.type=full", "export.formats=[merged]", "adapter.dora=true"],
            "leave dora and rslora false",
        ),
        (
            ["adapter.dora=true", "export.formats=[diffusers, kohya]"],
            "kohya files of DoRA adapters mean different things",
        ),
        (["export.formats=[]"], "export.formats is empty"),
        (["compare.weights=ema"], "compare.weights=ema needs an average: set adapter.ema"),
        (["adapter.ema=1.0"], "adapter.ema: 1.0 should be less than 1"),
    ],
)
def test_exports_and_averages_that_cannot_be_are_refused(write, overrides, expected):
    [line] = problems(write(), tuple(overrides))
    assert expected in line


@pytest.mark.parametrize(
    "value", ["${oc.env:HOME}", "${seed}", "a${", "\\${x}", "${oc.env:X,${y}}"]
)
def test_interpolations_are_refused_in_files_and_overrides(write, value, monkeypatch):
    monkeypatch.setenv("HOME", "/secret")
    for lines in (
        problems(write(), (f"model.path={json.dumps(value)}",)),
        problems(write(MINIMAL.replace("runs/x", json.dumps(value)))),
    ):
        assert len(lines) == 1 and "is not expanded in recipes" in lines[0]
        assert "/secret" not in lines[0]


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


def recipe_or_error(path: Path, overrides: list[str]) -> Recipe | None:
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
    path = tmp_path / "fuzz.yaml"
    path.write_bytes(raw)
    recipe_or_error(path, [])


@SETTINGS
@given(text=st.text(alphabet="ab:-[]{}&*!?|>'\"%@`,#=.~<$ \n\t\\0x1eE+", max_size=80))
def test_any_yaml_like_text_gives_a_recipe_or_a_recipe_error(tmp_path, text):
    path = tmp_path / "fuzz.yaml"
    path.write_text(MINIMAL + text, encoding="utf-8")
    recipe_or_error(path, [f"model.path={text}"])


@SETTINGS
@given(key=st.sampled_from(sorted(SCHEMA)), value=VALUES, spelled=st.booleans())
def test_any_value_at_any_key_gives_a_recipe_or_a_recipe_error(tmp_path, key, value, spelled):
    path = tmp_path / "fuzz.yaml"
    text = json.dumps(value)
    path.write_text(MINIMAL, encoding="utf-8")
    recipe = recipe_or_error(path, [f"{key}={text if spelled else value}"])
    if recipe is not None:
        save_resolved(recipe, tmp_path / "resolved.yaml")
        assert load_recipe(tmp_path / "resolved.yaml") == recipe


@SETTINGS
@given(argument=st.text(max_size=30))
def test_any_override_gives_a_recipe_or_a_recipe_error(tmp_path, argument):
    path = tmp_path / "fuzz.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    recipe_or_error(path, [argument])


# --------------------------------------------------------------------------------------------------
# Saving


@SETTINGS
@given(
    text=st.one_of(
        st.text(min_size=1, max_size=40),
        st.sampled_from(
            ["1e-4", "no", "null", "~", "007", "1:30", " a ", "a: b", "#", "é\n\u2028"]
        ),
    ).filter(lambda text: "${" not in text),
    lr=st.floats(min_value=1e-300, max_value=1e300),
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
    recipe = load_recipe(write(), ["compare.judge.path=j"])
    path = tmp_path / "deep" / "run" / "recipe.yaml"
    save_resolved(recipe, path)
    save_resolved(recipe, path)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# The recipe of this run")
    assert flatten(Source("").read(text)) == set(KNOBS)
    assert [p.name for p in path.parent.iterdir()] == ["recipe.yaml"]


def test_a_failed_save_keeps_the_old_file(tmp_path, write, monkeypatch):
    recipe = load_recipe(write())
    path = tmp_path / "out" / "recipe.yaml"
    save_resolved(recipe, path)
    before = path.read_bytes()

    def no_space(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with refused(RecipeError, "unwritable", str(path)):
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
    "data.workers",
}


def test_identity_holds_what_decides_the_result_and_nothing_else(write):
    """Every new knob must be sorted in here: does a resumed run have to share it?"""
    watched = ("prompts.", "reward.", "prepare.", "speed.", "checkpoint.", "monitor.", "export.")
    watched += ("cluster.", "compare.")
    expected = {key for key in KNOBS if not key.startswith(watched)} - RUNTIME
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
    ("arguments", "expected"),
    [
        ([], "no recipe given: deepspeed engine/train.py --recipe RECIPE.yaml"),
        (["train.steps=3"], "no recipe given"),
        (["--recipe"], "expected one argument"),
        (["--recipe", "x.yaml", "--steps", "3"], "unrecognized arguments: --steps"),
        (["--rec", "x.yaml"], "unrecognized arguments: --rec"),
        (["--recipe", "x.yaml", "--world-size", "2"], "--world-size 2: it is a number of ranks"),
        (["--recipe", "x.yaml", "--dry-run", "--world-size", "0"], "--world-size 0: it is"),
    ],
)
def test_usage_errors_are_recipe_errors(arguments, expected):
    with pytest.raises(RecipeError, match="(?s)" + expected.replace(".", r"\.")):
        parse_command_line("train", arguments)


def test_a_dry_run_is_asked_for_by_a_flag_of_train_alone(write):
    asked = parse_command_line(
        "train", ["--dry-run", "--recipe", str(write()), "--world-size", "8", "seed=5"]
    )
    assert (asked.dry_run, asked.world_size, asked.recipe.seed) == (True, 8, 5)
    assert not parse_command_line("train", ["--recipe", str(write())]).dry_run
    with pytest.raises(RecipeError, match="unrecognized arguments: --dry-run"):
        parse_command_line("prepare", ["--recipe", str(write()), "--dry-run"])


def test_help_lists_every_knob_with_its_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_command_line("prepare", ["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: deepspeed engine/prepare.py --recipe")
    assert describe_schema() in shown
    for key in KNOBS:
        assert f"\n  {key} = " in shown
        assert SCHEMA[key].description, f"{key} has no docstring"
