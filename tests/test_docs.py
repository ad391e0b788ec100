"""What the documents name is there: links, files, commands, keys, and the code that they quote."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterator

import pytest
import yaml
from cdpo.engine import command_line
from cdpo.engine.basics import errors
from cdpo.engine.display.terminal import Terminal
from cdpo.engine.recipe import Recipe
from cdpo.engine.recipe.keys import SCHEMA
from cdpo.engine.recipe.reading import load_recipe
from cdpo.engine.training.dry_run.plan import print_plan
from launching import ROOT
from test_layout import ROOMS

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("assets/*/README.md")]
}
RECIPES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in ROOT.glob("recipes/*.yaml")
}
GENERATED = "docs/recipe.md"  # names keys by their section, and has a test of its own
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.M | re.S)
FOLDERS = "engine|kernels|docs|recipes|benchmarks|tests|assets|ds_configs"
FILE = re.compile(rf"(?<![\w./:-])(?:{FOLDERS})/[\w./*-]*[\w/*]")
KEY = re.compile(rf"(?<![\w./-])(?:{'|'.join(Recipe.model_fields)})(?:\.[a-z_]+)+(?![\w(/]|\.\w)")
NAMES = {path.name for folder in FOLDERS.split("|") for path in (ROOT / folder).rglob("*")}
FILES = (".py", ".json", ".yaml", ".txt", ".png")

on_every_page = pytest.mark.parametrize("page", PAGES)


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a language, without what a list indents them by."""
    found = FENCED.findall(PAGES[page])
    return [textwrap.dedent(text) for _, name, text in found if name == language]


def prose(page: str) -> str:
    return FENCED.sub("", PAGES[page])


def code(page: str) -> str:
    """All that stands between backticks, a line each."""
    fenced = [text for _, _, text in FENCED.findall(PAGES[page])]
    return "\n".join([*fenced, *(span.replace("\n", " ") for span in spans(page))])


def spans(page: str) -> list[str]:
    return re.findall(r"`([^`]+)`", prose(page))


def anchors(page: str) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@on_every_page
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), f"{page}: no file for {link}"
        if anchor:
            there = target.resolve().relative_to(ROOT).as_posix()
            assert anchor in anchors(there), f"{page}: no heading for {link}"


@pytest.mark.parametrize("page", [*PAGES, *RECIPES])
def test_files_exist(page: str) -> None:
    text = code(page) if page in PAGES else RECIPES[page]
    for name in FILE.findall(text):
        assert any(ROOT.glob(name.rstrip("/"))) or "NAME" in name, f"{page}: {name} is not there"
    for name in spans(page) if page in PAGES else ():
        if re.fullmatch(r"\w+\.py", name):
            assert name in NAMES or "NAME" in name, f"{page}: no file is called {name}"


@on_every_page
def test_commands_exist(page: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    described = re.findall(r"^cdpo ([\w|]+) ?([\w|]*)", command_line.__doc__ or "", re.M)
    ours = {verb: inner for verbs, inner in described for verb in verbs.split("|")}
    for target in re.findall(r"^(?:\$ )?make ([a-z-]+)", code(page), re.M):
        assert target in targets, f"{page}: make {target}"
    for verb, inner in re.findall(r"^(?:\$ )?cdpo ([a-z]+) ?([a-z]*)", code(page), re.M):
        assert verb in ours, f"{page}: cdpo {verb}"
        assert verb != "shards" or inner in ["", *ours[verb].split("|")], f"{page}: shards {inner}"
    for module in re.findall(r"-m cdpo\.([\w.]+)", code(page)):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), f"{page}: -m cdpo.{module}"


@on_every_page
def test_keys_are_those_of_the_schema(page: str) -> None:
    for key in KEY.findall(code(page)) if page != GENERATED else ():
        assert key in SCHEMA or f".{key.rpartition('.')[2]}" in FILES, f"{page}: no key {key}"
    for block in blocks(page, "yaml"):
        for key in keys_of(yaml.safe_load(block)):
            assert key in SCHEMA, f"{page}: no key {key}"


def keys_of(value: object, prefix: str = "") -> Iterator[str]:
    """Dotted keys of a part of a recipe; what a knob maps names to is the user's."""
    if isinstance(value, list):
        for item in value:
            yield from keys_of(item, f"{prefix[:-1]}[].")
    elif isinstance(value, dict) and (not prefix or any(key.startswith(prefix) for key in SCHEMA)):
        for name, inner in value.items():
            yield f"{prefix}{name}"
            yield from keys_of(inner, f"{prefix}{name}.")


def test_quoted_code_is_that_of_the_file_it_names() -> None:
    quotes = blocks("CONTRIBUTING.md", "python")
    assert len(quotes) >= 5
    for quote in quotes:
        first, _, text = quote.partition("\n")
        file = re.match(r"# ([\w/.]+?)(?::|$)", first)
        assert file, f"{first} names no file"
        assert text in (ROOT / file[1]).read_text(encoding="utf-8"), f"{file[1]} reads otherwise"


def test_exit_codes_stand_once_and_are_all_of_them() -> None:
    listed = {page: re.findall(r"^\| (\d+) \|", text, re.M) for page, text in PAGES.items()}
    ours = [str(value) for name, value in vars(errors).items() if name.startswith("EXIT_")]
    assert listed["docs/reliability.md"] == ours
    assert [page for page, text in PAGES.items() if re.search(r"\b5\b[ |]+checkpoint", text)] == [
        "docs/reliability.md"
    ]


def test_readme_is_read_in_two_minutes() -> None:
    lines = PAGES["README.md"].splitlines()
    assert len(lines) <= 180
    assert max(map(len, lines)) <= 100


def test_readme_shows_a_recipe_as_it_is() -> None:
    assert blocks("README.md", "yaml") == [RECIPES["recipes/sd15_cdpo.yaml"]]


def test_the_rooms_are_told_of_as_they_are() -> None:
    """CONTRIBUTING's table is that of test_layout, and README's list is in its order."""
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ?([^|]*?) ?\|$", PAGES["CONTRIBUTING.md"], re.M)
    told: dict[str, set[str]] = {}
    for room, cell in rows:
        above, names = set(told), set(cell.removeprefix("all above but ").split(", ")) - {""}
        told[room] = above - names if "all above" in cell else names
        assert names - {"all above"} <= above
    assert told == ROOMS
    rooms = re.findall(r"^  (\w+)/", PAGES["README.md"], re.M)
    assert rooms == [room for room in told if room not in ("kernels", "root")]


def test_the_dry_run_prints_what_performance_shows() -> None:
    (shown,) = (block for block in blocks("docs/performance.md", "") if "--dry-run" in block)
    written = io.StringIO()
    # Of shards that somebody's demo has left here it would say more.
    recipe = load_recipe(ROOT / "recipes/emoji_cdpo.yaml", ["data.path=nowhere"])
    print_plan(recipe, 1, Terminal(stdout=written))
    told = [re.sub(r"  speed  [^\n]*\n", "", text) for text in (shown, written.getvalue())]
    assert told[0].partition("\n")[2].split() == told[1].split()
