"""Prompts: what counts as one in files and templates, how they are divided, and what is wrong with
them, in one line.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cdpo.engine.basics.errors import DataError
from cdpo.engine.recipe import Prompts
from cdpo.engine.recipe.prompts import MAX_PROMPT_CHARACTERS
from cdpo.engine.recipe.reading import load_recipe
from cdpo.engine.sources.left_out import LeftOut
from cdpo.engine.sources.prompts import OTHER_SPELLING, REPEATED, read_prompts
from cdpo.engine.sources.text_tables import MAX_LINE
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused

ROOT = Path(__file__).parents[3]
TEXTS = [f"prompt number {number}" for number in range(300)]


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def read_train(folder: Path, content: str | bytes, limit: int | None = None) -> list[str]:
    spec = Prompts(train=write(folder, "train.txt", content), limit=limit)
    train, heldout, _ = read_prompts(spec, seed=0)
    assert heldout == []
    return train


def table(folder: Path, kind: str, columns: dict[str, list[object]]) -> str:
    """A table of these columns; as CSV and TSV of their text."""
    path = folder / f"table.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table(columns), path, row_group_size=2)
    elif kind == "jsonl":
        rows = zip(*columns.values(), strict=True)
        lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in rows]
        path.write_text("\n".join(lines) + "\n")
    else:
        mark = "\t" if kind == "tsv" else ","
        rows = [columns.keys(), *zip(*columns.values(), strict=True)]
        cells = [[f'"{"" if cell is None else cell}"' for cell in row] for row in rows]
        path.write_text("\n".join(mark.join(row) for row in cells) + "\n")
    return str(path)


def filled_in(templates: list[str], **lists: str | tuple[str, ...]) -> list[str]:
    spec = Prompts.model_validate({"train": {"templates": templates, "lists": lists}})
    return read_prompts(spec, seed=0)[0]


# --------------------------------------------------------------------------------------------------
# Text files


def test_a_line_is_a_prompt(tmp_path):
    content = "# animals\na dog\n\n   a cat  \n\t\n  # not a prompt\na dog\na #1 fan"
    assert read_train(tmp_path, content) == ["a dog", "a cat", "a #1 fan"]


def test_files_of_other_systems(tmp_path):
    """Line ends of Windows, and the byte order mark that its editors put in front."""
    assert read_train(tmp_path, b"\xef\xbb\xbfa dog\r\na caf\xc3\xa9\r\n") == ["a dog", "a café"]
    assert read_train(tmp_path, b"\xef\xbb\xbf# comment\na dog") == ["a dog"]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\v", "\f", "\x1c"])
def test_what_is_no_end_of_line_ends_no_prompt(tmp_path, mark):
    assert read_train(tmp_path, f"a{mark}b\r\nc\rd\n") == [f"a{mark}b", "c", "d"]


@pytest.mark.parametrize(
    "entries",
    [["a", " b ", "", "a"], [{"prompt": "a", "x": 1}, {"prompt": None}, {"prompt": "b"}]],
)
def test_a_json_list_holds_texts_or_rows(tmp_path, entries):
    path = write(tmp_path, "train.JSON", json.dumps(entries, indent=1))
    assert read_prompts(Prompts(train=path), seed=0)[0] == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "kind", "key"),
    [
        ('{"prompt": "a"}', "wrong-type", "train.json line 1"),
        ("[1]", "wrong-type", "train.json entry 1 (line 1)"),
        ('[{"text": "a"}]', "missing", "prompts.column"),
        ('[{"prompt": 1}]', "wrong-type", "train.json entry 1 (line 1), column prompt"),
        ('["a"', "damaged", "train.json entry 1 (line 1)"),
        ("[" * 100_000, "damaged", "train.json entry 1 (line 1)"),
        ("[]", "empty", "prompts.train"),
    ],
)
def test_a_json_file_that_is_no_list_of_prompts(tmp_path, content, kind, key):
    path = write(tmp_path, "train.json", content)
    with refused(DataError, kind, str(tmp_path / key) if key.startswith("train") else key):
        read_prompts(Prompts(train=path), seed=0)


def test_yaml_is_not_taken_for_lines(tmp_path):
    path = write(tmp_path, "train.yaml", "- a\n- b\n")
    with refused(DataError, "unsupported", path):
        read_prompts(Prompts(train=path), seed=0)


SETS = ROOT.parent / "shared" / "data"


@pytest.mark.skipif(
    not SETS.is_dir(), reason="the field's own prompt files are not beside the tree"
)
@pytest.mark.parametrize("name", ["hpsv2.json", "papv2.json", "partiprompts.json", "geneval.jsonl"])
def test_prompt_sets_of_the_field(name):
    found, *_ = read_prompts(Prompts(train=str(SETS / name)), seed=0)
    assert len(found) > 100 and all(text == text.strip() for text in found)


def test_limit_takes_the_first_distinct_ones_of_each_set(tmp_path):
    assert read_train(tmp_path, "b\nb\na\nc\n", limit=2) == ["b", "a"]
    assert read_train(tmp_path, "b\na", limit=9) == ["b", "a"]
    spec = Prompts(
        train=write(tmp_path, "t", "a\nb"), heldout=write(tmp_path, "h", "c\nd"), limit=1
    )
    assert read_prompts(spec, 0) == (["a"], ["c"], [])


def test_held_out_prompts_are_not_trained_on(tmp_path):
    spec = Prompts(
        train=write(tmp_path, "t", "a dog\na cat\na cow"),
        heldout=write(tmp_path, "h", "a cow \na pig\na cat"),
    )
    with refused(DataError, "duplicate", "prompts.heldout"):
        read_prompts(spec, 0)


@pytest.mark.parametrize("content", ["", "\n \n", "# only\n# comments"])
def test_a_file_without_prompts(tmp_path, content):
    with refused(DataError, "empty", "prompts.train"):
        read_train(tmp_path, content)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "tsv", "parquet"])
def test_a_file_that_cannot_be_read(tmp_path, kind):
    folder = tmp_path / f"folder.{kind}"
    folder.mkdir()
    for path in (tmp_path / f"absent.{kind}", folder):
        with refused(DataError, "unreadable", str(path)) as caught:
            read_prompts(Prompts(train=str(path)), 0)
        assert "\n" not in str(caught.value)


def test_a_file_that_is_not_text(tmp_path):
    with refused(DataError, "unreadable"):
        read_train(tmp_path, b"a dog\n\xff\xfe")


def test_a_prompt_that_is_too_long_is_named_by_its_line(tmp_path):
    longest = "x" * MAX_PROMPT_CHARACTERS
    assert read_train(tmp_path, f"a\n{longest}\n# {longest}") == ["a", longest]
    with refused(DataError, "too-large", f"{tmp_path / 'train.txt'} line 2"):
        read_train(tmp_path, f"a\n{longest}y")


# --------------------------------------------------------------------------------------------------
# Tables

KINDS = ["parquet", "csv", "tsv", "jsonl"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_of_a_table(tmp_path, kind):
    """Repeated and blank cells as in text; `#` is no comment there, and a cell may hold commas."""
    cells = ["a dog", "  a cat ", "a dog", "", None, "# one, two", "\t"]
    path = table(tmp_path, kind, {"id": list(range(7)), "text": cells})
    found, *_ = read_prompts(Prompts(train=path, column="text"), 0)
    assert found == ["a dog", "a cat", "# one, two"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_without_the_column_names_those_it_has(tmp_path, kind):
    path = table(tmp_path, kind, {"caption": ["a"], "score": [1]})
    with refused(DataError, "missing", "prompts.column") as caught:
        read_prompts(Prompts(train=path), 0)
    assert str(caught.value).startswith(f"prompts: {path}")
    assert "caption, score" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "row"),
    [("parquet", "row 2"), ("csv", "line 4"), ("tsv", "line 4"), ("jsonl", "line 3")],
)
def test_a_cell_that_is_too_long_is_named_by_row_and_column(tmp_path, kind, row):
    cells = ["a", "b", "x" * (MAX_PROMPT_CHARACTERS + 1)]
    path = table(tmp_path, kind, {"prompt": cells})
    with refused(DataError, "too-large", f"{path} {row}, column prompt"):
        read_prompts(Prompts(train=path), 0)


@pytest.mark.parametrize(("kind", "row"), [("parquet", "row 0"), ("jsonl", "line 1")])
def test_a_column_that_is_not_text(tmp_path, kind, row):
    path = table(tmp_path, kind, {"prompt": [7, 8]})
    with refused(DataError, "wrong-type", f"{path} {row}, column prompt"):
        read_prompts(Prompts(train=path), 0)


@pytest.mark.parametrize(
    ("second", "kind", "column"),
    [
        (b'{"prompt": "a \\ud83d"}', "damaged", ", column prompt"),
        (b"{", "damaged", ""),
        (b"[" * 100_000, "damaged", ""),
        (b'["a"]', "wrong-type", ""),
        (b'{"text": "b"}', "missing", None),
        (b'{"prompt": "' + b"x" * MAX_LINE + b'"}', "too-large", ""),
    ],
    ids=["letter", "half", "deep", "list", "other", "long"],
)
def test_lines_of_jsonl_that_are_no_row(tmp_path, second, kind, column):
    path = write(tmp_path, "t.jsonl", b'{"prompt": "a"}\n' + second + b"\n")
    key = "prompts.column" if column is None else f"{path} line 2{column}"
    with refused(DataError, kind, key) as caught:
        read_prompts(Prompts(train=path), 0)
    assert f"prompts: {path} line 2" in str(caught.value)


def test_a_parquet_file_that_is_none(tmp_path):
    path = write(tmp_path, "t.parquet", b"PAR1, not really")
    with refused(DataError, "unreadable", str(path)):
        read_prompts(Prompts(train=path), 0)


# --------------------------------------------------------------------------------------------------
# Templates


def test_templates_run_through_their_lists_the_last_one_fastest():
    lists = {"animal": ("a dog", "an owl"), "activity": ("riding a bike", "playing chess")}
    assert filled_in(["{animal} {activity}", "a photo of {animal}"], **lists) == [
        "a dog riding a bike",
        "a dog playing chess",
        "an owl riding a bike",
        "an owl playing chess",
        "a photo of a dog",
        "a photo of an owl",
    ]


def test_a_list_in_a_file_repeated_names_and_literal_braces(tmp_path):
    path = write(tmp_path, "animals.txt", "# with articles\na dog\nan owl\na dog\n")
    found = filled_in(["{animal} and {animal} in {{braces}}"], animal=path)
    assert found == ["a dog and a dog in {braces}", "an owl and an owl in {braces}"]
    assert filled_in(["{{{animal}}}"], animal=("{x}",)) == ["{{x}}"]  # what is put in is left alone
    assert filled_in(["nothing named"]) == ["nothing named"]


def test_lists_that_make_a_prompt_twice_make_it_once():
    assert filled_in(["{x}{y}"], x=("a", "ab"), y=("bc", "c")) == ["abc", "ac", "abbc"]


@pytest.mark.parametrize(
    "template",
    [
        *("{}", "{0}", "{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{a:{b}}", "{a b}", "{a", "a}"),
        "{__class__.__mro__}",
    ],
)
def test_templates_hold_names_of_lists_and_nothing_else(template):
    with pytest.raises(ValueError, match="template") as caught:
        filled_in([template], a=("x",), b=("y",))
    assert repr(template) in str(caught.value)


def test_lists_that_are_empty_too_long_or_too_many(tmp_path):
    empty = write(tmp_path, "empty.txt", "# nothing\n")
    for entries in (empty, (), (" ",)):
        with refused(DataError, "empty", "prompts.train.lists.a"):
            filled_in(["{a}"], a=entries)
    with refused(DataError, "out-of-range", "prompts.train"):
        filled_in(["{a}{a}"], a=("x" * 1100,))
    with refused(DataError, "damaged", "prompts.train"):
        filled_in(["{a}!"], a=("b", "\ud83d"))
    digits = tuple(map(str, range(200)))
    with refused(DataError, "too-large", "prompts.train"):
        filled_in(["{a}{b}{c}"], a=digits, b=digits, c=digits)


def test_the_sets_of_the_papers(monkeypatch):
    """D1 is 45 animals x 3 activities, 45 photos for aesthetics; other ones are held out."""
    monkeypatch.chdir(ROOT)
    recipe = load_recipe("recipes/sd15_cdpo.yaml")
    train, heldout, _ = read_prompts(recipe.prompts, recipe.seed)
    assert (len(train), len(heldout)) == (135, 36)
    assert {"a dog riding a bike", "an ant washing the dishes"} < set(train)
    assert not any(" a ant" in f" {prompt}" for prompt in train + heldout)
    photos = ["prompts.train.templates=['a photo of {animal}']"]
    photos += ["prompts.train.lists={animal: recipes/prompts/animals.txt}"]
    recipe = load_recipe("recipes/sd15_cdpo.yaml", photos)
    train = read_prompts(recipe.prompts, recipe.seed).train
    assert len(train) == 45 and train[1] == "a photo of a dog"


# --------------------------------------------------------------------------------------------------
# The split


def split(
    folder: Path, prompts: list[str], seed: int = 0, **by: float
) -> tuple[set[str], set[str]]:
    spec = {"train": write(folder, "all.txt", "\n".join(prompts)), "heldout": by}
    train, heldout, _ = read_prompts(Prompts.model_validate(spec), seed)
    assert [p for p in prompts if p in set(train)] == train, "the order is that of the file"
    assert sorted(train + heldout) == sorted(prompts)
    return set(train), set(heldout)


def test_a_split_is_a_function_of_seed_and_prompt_alone(tmp_path):
    train, heldout = split(tmp_path, TEXTS, fraction=0.2)
    assert 40 <= len(heldout) <= 80  # 60 expected, 6.9 standard deviation
    assert split(tmp_path, TEXTS[::-1], fraction=0.2) == (train, heldout)
    fewer = split(tmp_path, TEXTS[::3], fraction=0.2)
    assert fewer == (train & set(TEXTS[::3]), heldout & set(TEXTS[::3]))
    assert split(tmp_path, TEXTS, seed=1, fraction=0.2)[1] != heldout
    assert heldout < split(tmp_path, TEXTS, fraction=0.5)[1]


def test_a_split_by_count_takes_the_lowest_draws(tmp_path):
    _, ten = split(tmp_path, TEXTS, count=10)
    _, twenty = split(tmp_path, TEXTS[::-1], count=20)
    assert len(ten) == 10 and len(twenty) == 20 and ten < twenty
    _, joined = split(tmp_path, [*TEXTS, "one more"], count=10)
    assert len(joined - ten) <= 1
    _, drawn = split(tmp_path, TEXTS, fraction=0.5)
    assert ten < drawn  # the same draws decide both


def test_limit_comes_after_the_split(tmp_path):
    train, heldout = split(tmp_path, TEXTS, fraction=0.2)
    spec = Prompts.model_validate(
        {"train": str(tmp_path / "all.txt"), "heldout": {"fraction": 0.2}, "limit": 5}
    )
    few, out, _ = read_prompts(spec, 0)
    assert (len(few), len(out)) == (5, 5)
    assert set(few) < train and set(out) < heldout


@pytest.mark.parametrize("by", [{"fraction": 1e-6}, {"count": 300}, {"count": 999}])
def test_both_sides_need_a_prompt(tmp_path, by):
    with refused(DataError, "empty", f"prompts.heldout.{next(iter(by))}"):
        split(tmp_path, TEXTS, **by)


def test_templates_can_be_split_and_held_out(tmp_path):
    animals = {"templates": ["a {x}"], "lists": {"x": ("dog", "cat", "cow", "pig")}}
    spec = Prompts.model_validate({"train": animals, "heldout": {"count": 1}})
    train, heldout, _ = read_prompts(spec, 0)
    assert len(train) == 3 and len(heldout) == 1
    spec = Prompts.model_validate({"train": animals, "heldout": animals})
    with refused(DataError, "duplicate", "prompts.heldout"):
        read_prompts(spec, 0)


def test_validation_is_split_off_what_is_left_and_moves_nothing_else(tmp_path):
    train, heldout = split(tmp_path, TEXTS, fraction=0.2)
    spec = {"train": str(tmp_path / "all.txt"), "heldout": {"fraction": 0.2}}
    sets = read_prompts(Prompts.model_validate(spec | {"validation": {"count": 30}}), 0)
    assert set(sets.heldout) == heldout and len(sets.validation) == 30
    assert set(sets.train) == train - set(sets.validation)
    # Draws of its own: those with the lowest draws of the first split are gone.
    alone = read_prompts(Prompts.model_validate(spec | {"validation": {"fraction": 0.2}}), 0)
    assert len(alone.validation) > 20


@pytest.mark.parametrize("shared", ["train", "heldout"])
def test_what_validates_is_neither_trained_on_nor_reported(tmp_path, shared):
    files = {"train": "a dog", "heldout": "a cat", "validation": "a cow"}
    files[shared] += "\nA  cow."
    spec = {name: write(tmp_path, name, text) for name, text in files.items()}
    with refused(DataError, "duplicate", "prompts.validation"):
        read_prompts(Prompts.model_validate(spec), 0)


@given(st.lists(st.text("ab{}:!.[]0_", max_size=6), min_size=1, max_size=3))
def test_any_template_is_refused_or_makes_one_prompt_an_entry(templates):
    try:
        found = filled_in(templates, a=("x", "y"))
    except (ValueError, DataError):
        return
    assert 1 <= len(found) <= 2 * len(templates)


# --------------------------------------------------------------------------------------------------
# Other spellings of one prompt

SPELLINGS = [
    "Red Apple",
    "red  apple",
    "red\u00a0apple",
    "r\u200bed apple",
    "red apple.",
    " \ufeffred apple",
]


@pytest.mark.parametrize("spelling", [*SPELLINGS, "red caf\u00e9", "red cafe\u0301"])
def test_a_held_out_prompt_is_not_trained_on_in_another_spelling(tmp_path, spelling):
    train = write(tmp_path, "t", f"a dog\n{spelling}")
    heldout = write(tmp_path, "h", "red apple\nred caf\u00e9")
    with refused(DataError, "duplicate", "prompts.heldout"):
        read_prompts(Prompts(train=train, heldout=heldout), 0)


def test_of_several_spellings_the_first_is_trained_on_and_the_others_are_named(tmp_path):
    path = write(tmp_path, "t", "\n".join(["Red Apple", "a dog", *SPELLINGS, "Red Apple"]))
    file = io.BytesIO()
    left_out = LeftOut(file)
    train = read_prompts(Prompts(train=path), 0, left_out).train
    assert train == ["Red Apple", "a dog"]
    assert left_out.rows == {OTHER_SPELLING: len(SPELLINGS) - 1, REPEATED: 2}
    named = csv.reader(file.getvalue().decode().splitlines())
    (where,) = [row[1] for row in named if row[5] == "'red apple.', earlier 'Red Apple'"]
    assert where == "line 7"


def test_templates_that_differ_in_spelling_alone_make_one_prompt():
    assert filled_in(["{a} bike", "{a}  Bike."], a=("a red",)) == ["a red bike"]


def test_a_prompt_of_invisible_characters_is_none(tmp_path):
    assert read_train(tmp_path, "a\n\u200b\n\ufeff \u2060\nb") == ["a", "b"]


def test_other_spellings_move_no_prompt_to_the_other_side(tmp_path):
    """The first spelling is the one that is keyed, so a file without others is split as ever."""
    train, heldout = split(tmp_path, TEXTS, fraction=0.2)
    more = [spelling for text in TEXTS for spelling in (text, text.title(), text + ".")]
    spec = {"train": write(tmp_path, "all.txt", "\n".join(more)), "heldout": {"fraction": 0.2}}
    found = read_prompts(Prompts.model_validate(spec), 0)
    assert (set(found[0]), set(found[1])) == (train, heldout)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem
)
def test_prompts_of_shipped_recipes_are_each_one_of_its_own(path, monkeypatch):
    """So their splits, image keys and shards are those of the texts as they stand."""
    monkeypatch.chdir(ROOT)
    recipe, left_out = load_recipe(str(path)), LeftOut()
    read_prompts(recipe.prompts, recipe.seed, left_out)
    assert OTHER_SPELLING not in left_out.rows
