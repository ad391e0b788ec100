"""Secrets: none is taken into a recipe, and none that comes by another way is told or written."""

from __future__ import annotations

from pathlib import Path

import pytest
from cdpo.engine.basics.errors import RecipeError
from cdpo.engine.recipe.keys import SCHEMA, is_knob
from cdpo.engine.recipe.reading import load_recipe
from launching import World
from refusals import refused

SECRET = "c0rrect-h0rse"
URLS = (
    f"https://user:{SECRET}@host/set",
    f"https://{SECRET}@host/set",
    f"hf://user:{SECRET}@datasets/me/mine",
    f"s3://AKIA:{SECRET}/+x@bucket/set",
    f"https://host/set?token={SECRET}",
    f"https://host/{'long/' * 20}set?X-Amz-Expires=9&X-Amz-Signature={SECRET}",
    f"https://host/set?se=2026&sig={SECRET}",
)
KEYS = [key for key, info in SCHEMA.items() if is_knob(info) and "[]" not in key]
# Keys of a section such as `prompts.train` do not go with a text in its place: two commands.
BELOW = [key for key in KEYS if any(key.startswith(f"{other}.") for other in KEYS)]
ABOVE = [key for key in KEYS if key not in BELOW]


@pytest.mark.parametrize("url", URLS)
def test_no_key_takes_one(tiny_world, tmp_path, url):
    """On the command line, in the file, as a value, inside a list, as a name, as what is no key."""
    recipe, copy = tiny_world / "recipe.yaml", tmp_path / "recipe.yaml"
    for keys in (ABOVE, BELOW):
        with refused(RecipeError, "secret") as told:
            load_recipe(recipe, [f'{key}="{url}"' for key in keys])
        assert {key for key, kind, _ in told.value.problems if kind == "secret"} == set(keys)
        assert SECRET not in str(told.value)
    text = recipe.read_text()
    for line, key in {
        f'monitor: {{nonsense: "{url}"}}': "monitor.nonsense",
        f'monitor: {{"{url.replace(".", "")}": 1}}': None,
        f'monitor: [["{url}"]]': "monitor[0][0]",
        f'"{url}"': None,
        f"monitor: {{a: {url}": None,
    }.items():
        copy.write_text(f"{text}\n{line}\n")
        with pytest.raises(RecipeError) as found:
            load_recipe(copy)
        assert SECRET not in str(found.value)
        assert key in (None, found.value.key)
    for overrides in ([url], [f"{url}=1"], [f"run_dri={url}"]):
        with pytest.raises(RecipeError) as found:
            load_recipe(recipe, overrides)
        assert SECRET not in str(found.value)


def test_none_of_a_data_set_or_the_environment_is_told_or_written(world: World, tmp_path: Path):
    """Signed URLs in comments of prompts, which are named, and as names of pictures, which end the
    import; a prompt itself is kept to the letter.
    """
    run, table = tmp_path / "run", tmp_path / "pairs.csv"
    cells = [f"a/1.png,{url},a red apple" for url in URLS]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n" + "".join(f"# of {url}\n" for url in URLS))
    table.write_text("\n".join(["winner,loser,caption", *cells]))
    env = {"HF_TOKEN": "0f-the-env1ronment", "AWS_SECRET_ACCESS_KEY": SECRET}
    mine = [f"run_dir={run}", f"prompts.train={prompts}", "prepare.candidates_per_prompt=2"]
    source = f"prepare.source={{type: paired, path: {table}, images: [winner, loser], label: null}}"
    said = ""
    for overrides in ([], [source, "curriculum.difficulty=score_gap"]):
        outcome = world.server.run("prepare", world.recipe, [*mine, *overrides], env=env)
        said += outcome.text
    assert SECRET not in said and env["HF_TOKEN"] not in said
    assert (run / "left_out.csv").exists()
    holding = [
        path for path in run.rglob("*") if path.is_file() and SECRET in path.read_text("latin-1")
    ]
    assert holding == [], said
