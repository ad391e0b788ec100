"""What holds the project together: names, import direction, size of files."""

import ast
import graphlib
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("engine", "kernels", "benchmarks", "assets")
    for path in (ROOT / folder).rglob("*.py")
)
ENTRIES = {"prepare", "train", "compare", "command_line"}
BASE = {"errors", "keyed", "phases"}
BASE |= {"recipe", "recipe_types", "recipe_adapter", "recipe_cluster", "recipe_data"}
BASE |= {"recipe_prompts"}
BASE |= {"recipe_compare"}
BASE |= {"recipe_source", "recipe_reward"}
BASE |= {"recipe_yaml", "recipe_schema", "recipe_file"}
BASE |= {"deepspeed_config"}
MIDDLE = {"backbones", "curriculum", "objectives", "reporting", "rewards", "shards", "sources"}
PROTOCOL = "cdpo.engine.models.protocol."  # all that an objective knows of a backbone
# Not installed here, perhaps, but imported by the libraries we use when they are.
OPTIONAL = {
    *("apex", "bitsandbytes", "cv2", "datasets", "einops", "evaluate", "flash_attn", "kernels"),
    *("librosa", "onnx", "onnxruntime", "optimum", "scipy", "sentencepiece", "sklearn"),
    *("tensorflow", "timm", "torchao", "torchaudio", "torchvision", "trl", "wandb", "xformers"),
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import in a file, those in functions included."""
    folder, *parts = path.relative_to(ROOT).with_suffix("").parts
    package = ["cdpo", folder, *parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                yield node.lineno, ".".join([*prefix, alias.name])


def component(name: str) -> str | None:
    """The part of the project a dotted name belongs to, such as ``shards`` or ``kernels``."""
    match name.split("."):
        case ["cdpo", "engine", part, *_]:
            return part
        case ["cdpo", "kernels", *_]:
            return "kernels"
    return None


def own_component(path: Path) -> str:
    folder, first, *_ = path.relative_to(ROOT).with_suffix("").parts
    return folder if folder != "engine" else first


def test_there_is_something_to_check():
    assert len(SOURCES) > 10


def test_no_name_shadows_the_standard_library_or_a_package():
    """A script's folder and the root stand first on sys.path: see DESIGN, "No shadowing"."""
    installed = set(importlib.metadata.packages_distributions()) - {"cdpo"}
    taken = installed | OPTIONAL | set(sys.stdlib_module_names)
    names = {
        path.relative_to(ROOT).parts[1].removesuffix(".py"): relative(path)
        for path in SOURCES
        if relative(path).startswith(("engine/", "benchmarks/"))
    }
    assert {where for name, where in names.items() if name in taken} == set()


@pytest.mark.slow
@pytest.mark.parametrize("first", [".", "engine", "benchmarks"])
def test_the_libraries_import_with_our_folders_first(first):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / first)!r})\n"
        "from transformers import CLIPModel, CLIPTokenizer\n"
        "from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel\n"
        "import cdpo.engine.recipe.schema, cdpo.kernels\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_nothing_imports_upward():
    wrong = []
    for path in SOURCES:
        if relative(path).split("/")[0] not in ("engine", "kernels"):
            continue
        mine = own_component(path)
        allowed = BASE | {"kernels"}
        for line, name in imports(path):
            theirs = component(name)
            if theirs is None or theirs == mine:
                continue
            upward = (
                theirs in ENTRIES
                or (theirs == "trainer" and mine not in ENTRIES)
                or (mine in allowed and theirs not in allowed)
                or (mine == "kernels")
                or (mine == "backbones" and theirs == "objectives")
                or (mine == "objectives" and theirs == "backbones" and PROTOCOL not in name)
                or (mine in MIDDLE and theirs in {"launch", "trainer"})
            )
            if upward:
                wrong.append(f"{relative(path)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_parts_do_not_import_each_other_in_circles():
    graph: dict[str, set[str]] = {}
    for path in SOURCES:
        if relative(path).split("/")[0] not in ("engine", "kernels"):
            continue
        mine = own_component(path)
        theirs = {component(name) for _, name in imports(path)} - {mine, None, "__version__"}
        graph.setdefault(mine, set()).update(part for part in theirs if part)
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, naming the circle


def test_files_stay_readable():
    """STYLE: 120 to 300 lines, one job each. 400 is where a file must be divided."""
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    long = [f"{relative(path)} has {lines} lines" for path, lines in lengths.items() if lines > 400]
    assert not long, "\n".join(long)
