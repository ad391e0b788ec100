"""How a verb ends for what comes before its work, and for what no room has foreseen."""

from pathlib import Path

import pytest
from launching import ForkServer

OF_TWO = {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"RANK": "two"}, "RANK"),
        ({"RANK": ""}, "RANK"),
        ({"RANK": "1"}, "RANK"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT"),
        ({"WORLD_SIZE": "2"}, "RANK"),
        (OF_TWO, "RANK"),
        (OF_TWO | {"RANK": "1", "MASTER_PORT": ""}, "MASTER_PORT"),
    ],
)
def test_whoever_has_no_rank_says_so_itself(server: ForkServer, variables, name):
    server.run("train", Path("none.yaml"), env=variables).refused(2, name, "unset them")


FAILS = """
import os, sys
from cdpo.engine.ranks import run_verb

def main(ranks, recipe, terminal):
    os.chdir(f"{recipe.run_dir}/nowhere")

run_verb("train", main)
"""


@pytest.mark.parametrize("run_dir_takes_it", [True, False])
def test_what_the_system_refuses_leaves_its_traceback_in_a_file(
    server: ForkServer, tiny_world: Path, tmp_path: Path, run_dir_takes_it: bool
) -> None:
    """In the run folder, or where that cannot be in the user's cache; it is not printed."""
    script, run, cache = tmp_path / "fails.py", tmp_path / "run", tmp_path / "cache"
    script.write_text(FAILS)
    if not run_dir_takes_it:
        (run / "traceback.txt").mkdir(parents=True)
    outcome = server.run(
        script, tiny_world / "recipe.yaml", [f"run_dir={run}"], env={"XDG_CACHE_HOME": str(cache)}
    )
    kept = (run if run_dir_takes_it else cache / "cdpo") / "traceback.txt"
    outcome.refused(6, f"No such file or directory: {run}/nowhere", str(kept))
    assert 'os.chdir(f"{recipe.run_dir}/nowhere")' in kept.read_text()
    assert len([*tmp_path.rglob("traceback.txt*")]) == 1 + (not run_dir_takes_it)
