"""Data, recipes, models and checkpoints may come from strangers: none of them runs code.

What each parser refuses is tested beside it, in tests/engine/: tar members in
shards/test_tar_index.py, npy headers in shards/test_sample.py, alias bombs in
recipe/test_reading.py, markup in prompts in comparing/report/test_report_browser.py. Here: that no
code of ours asks a library to be lenient.
"""

import ast
import json
import os
import shutil
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from cdpo.engine.training.checkpoint.files import seal
from cdpo.engine.training.checkpoint.resharding import load_data
from launching import World

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for name in ("engine", "kernels") for path in (ROOT / name).rglob("*.py"))
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
HARMLESS = {"pickle.UnpicklingError"}  # torch raises it
FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"),
    *("torch.package.PackageImporter", "torch.jit.load", "torch.hub.load"),
    *("shutil.unpack_archive", "webdataset.WebDataset", "webdataset.DataPipeline"),
}
FORBIDDEN_METHODS = {"extractall", "extract", "allow_pickle", "load_state_dict_from_url"}
NEEDED = {"torch.load": ("weights_only", "True"), "numpy.load": ("allow_pickle", "False")}
LENIENT = {"allow_pickle": "False", "shell": "False", "trust_remote_code": "False"}


def unsafe(source: str) -> Iterator[tuple[int, str]]:
    """Line and reason of everything in a file that could run what it reads."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                if alias.name.split(".")[0] in PICKLES:
                    yield node.lineno, f"imports {alias.name}"
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                names[alias.asname or alias.name] = name
                if name.split(".")[0] in PICKLES and name not in HARMLESS:
                    yield node.lineno, f"imports {name}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        head, dot, rest = call.partition(".")
        call = names.get(head, head) + dot + rest
        options = {word.arg: ast.unparse(word.value) for word in node.keywords}
        key, wanted = NEEDED.get(call, (None, None))
        if call in FORBIDDEN or (dot and call.rpartition(".")[2] in FORBIDDEN_METHODS):
            yield node.lineno, f"calls {call}"
        elif key and options.get(key) != wanted:
            yield node.lineno, f"calls {call} without {key}={wanted}"
        elif any(options.get(name, value) != value for name, value in LENIENT.items()):
            yield node.lineno, f"calls {call} with {options}"


def test_no_code_of_ours_runs_what_it_reads():
    found = [
        f"{path.relative_to(ROOT)}:{line} {reason}"
        for path in SOURCES
        for line, reason in unsafe(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)
    assert len(SOURCES) > 50


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch as t\nt.load('x')",
        "from torch import load\nload('x', weights_only=False)",
        "import numpy as np\nnp.load('x')",
        "import numpy as np\nnp.lib.format.read_array(f, allow_pickle=True)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "from os import system\nsystem('x')",
        "import subprocess\nsubprocess.run('x', shell=True)",
        "tar.extractall('x')",
        "eval('x')",
        "import transformers as t\nt.AutoModel.from_pretrained('x', trust_remote_code=True)",
    ],
)
def test_the_search_finds(source):
    assert list(unsafe(source))


def test_the_search_lets_pass():
    source = (
        "import numpy as np\nimport re\nimport torch\nfrom pickle import UnpicklingError\n"
        "torch.load('x', weights_only=True)\nnp.load('x', allow_pickle=False)\nre.compile('x')\n"
        "model.eval()\nwriter.compile()\n"
    )
    assert not list(unsafe(source))


class Payload:
    """What a pickle does when it is loaded carelessly: makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_torch_file_with_code_in_it_is_refused_unrun(tmp_path):
    torch.save({"weights": torch.ones(2), "more": Payload(tmp_path / "ran")}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt holds more than data: .*mkdir") as error:
        load_data(tmp_path / "x.pt")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
    torch.save({"weights": torch.ones(2)}, tmp_path / "y.pt")
    assert load_data(tmp_path / "y.pt")["weights"].tolist() == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["*model_states.pt", "*pp_rank_1_*optim_states.pt"])
def test_a_checkpoint_with_code_in_it_ends_the_resume(world: World, tmp_path: Path, pattern: str):
    """As a stranger would send it: the checksums of its manifest are in order. What rank 1 alone
    reads is said by both ranks, and neither waits for the other.
    """
    first = world.folder / "to_poison"
    if not first.exists():
        world.train(first, "train.steps=1", ranks=2).succeeded()
    run = tmp_path / "run"
    shutil.copytree(first, run)
    [checkpoint] = (run / "checkpoints").glob("step-*")
    [path] = checkpoint.rglob(pattern)
    content = torch.load(path, weights_only=False)
    torch.save(content | {"more": Payload(tmp_path / "ran")}, path)
    manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    entry = manifest["files"][str(path.relative_to(checkpoint))]
    entry.update(bytes=path.stat().st_size, sha256=sha256(path.read_bytes()).hexdigest())
    (checkpoint / "MANIFEST.json").write_text(json.dumps(seal(manifest)))
    outcome = world.train(run, ranks=2)
    assert outcome.codes == [5, 5], outcome.text
    assert "holds more than data" in outcome.output[0]
    assert not (tmp_path / "ran").exists()
