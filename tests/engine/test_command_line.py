"""The console script: verbs and tools by one name."""

import ast
import importlib
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cdpo.engine import command_line, ranks
from cdpo.engine.preparing.shard_tools import command

ROOT = Path(__file__).resolve().parents[2]


def test_setup_names_a_function_that_is_there():
    setup = ast.parse((ROOT / "setup.py").read_text())
    [scripts] = [
        ast.literal_eval(keyword.value)["console_scripts"]
        for node in ast.walk(setup)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "entry_points"
    ]
    name, _, target = scripts[0].partition("=")
    module, _, function = target.partition(":")
    assert (name, getattr(importlib.import_module(module), function)) == ("cdpo", command_line.main)


@pytest.mark.parametrize("words", ["prepare", "train", "compare", "rounds", "cache fill"])
def test_a_verb_runs_as_its_script_does(words, monkeypatch):
    verb = words.partition(" ")[0]
    ran = []
    monkeypatch.setattr(ranks, "run_verb", lambda *arguments: ran.append(arguments))
    monkeypatch.setattr(sys, "argv", ["cdpo", *words.split(), "--recipe", "r.yaml", "seed=1"])
    command_line.main()
    module = importlib.import_module(f"cdpo.engine.{verb}")
    assert ran == [(verb, module.main, getattr(module, "dry_run", None))]
    assert sys.argv == [f"cdpo {words}", "--recipe", "r.yaml", "seed=1"]


def test_tools_get_their_arguments_and_give_the_exit_code(monkeypatch):
    asked = []
    monkeypatch.setattr(command, "main", lambda arguments: asked.append(arguments) or 3)
    monkeypatch.setattr(sys, "argv", ["cdpo", "shards", "check", "x"])
    with pytest.raises(SystemExit) as left:
        command_line.main()
    assert (asked, left.value.code) == ([["check", "x"]], 3)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["sd15_cdpo", "mine.yaml"], 0, "mine.yaml is yours"),
        (["sd15", "mine.yaml"], 2, "sd15_cdpo"),
        (["sd15_cdpo"], 2, "usage: cdpo new NAME MINE.yaml"),
        (["--help"], 0, "sd15_cdpo"),
    ],
)
def test_new_writes_a_copy_of_a_shipped_recipe(
    arguments, code, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cdpo", "new", *arguments])
    with pytest.raises(SystemExit) as left:
        command_line.main()
    assert left.value.code == code
    assert said in "".join(capsys.readouterr())
    assert (tmp_path / "mine.yaml").exists() == (arguments == ["sd15_cdpo", "mine.yaml"])


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["tarin"], 2), (["--help"], 0)])
def test_anything_else_shows_the_usage(arguments, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cdpo", *arguments])
    with pytest.raises(SystemExit) as left:
        command_line.main()
    assert left.value.code == code
    shown = "".join(capsys.readouterr())
    assert "cdpo prepare|train|compare --recipe R" in shown


@pytest.mark.long
def test_the_tools_run_by_the_console_script(tmp_path):
    script = "from cdpo.engine.command_line import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "shards", "check", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 3, done.stderr
    assert "no shards in" in done.stderr


def test_a_demo_that_is_to_stop_hands_that_to_its_verb(tmp_path):
    verb = tmp_path / "verb"  # stands for Python with a verb that saves and leaves with 75
    verb.write_text("#!/bin/sh\ntrap 'exit 75' TERM\necho ready\nsleep 60 & wait\n")
    verb.chmod(0o755)
    script = f"import sys; sys.executable = {str(verb)!r}\n"
    script += "from cdpo.engine.command_line import demo; sys.exit(demo([]))"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as demo:
        assert demo.stdout is not None
        assert demo.stdout.readline() == b"ready\n"
        time.sleep(0.2)  # between the start of a verb and the first wait for it
        demo.terminate()
        demo.stdout.close()  # which the sleeping one holds, too
        assert demo.wait(20) == 75
