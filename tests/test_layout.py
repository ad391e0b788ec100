"""What holds the project together: names, rooms and what each may import."""

import ast
import graphlib
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

from cdpo.engine.basics import errors

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("engine", "kernels", "benchmarks", "assets")
    for path in (ROOT / folder).rglob("*.py")
)
# The rooms of the house, from the ground up, and which of those below each may import; a sentence
# on each is in CONTRIBUTING.md. `root` is what lies in engine/ itself: the verbs.
ROOMS: dict[str, set[str]] = {"kernels": set(), "basics": {"kernels"}}
ROOMS["recipe"] = {"basics"}
ROOMS["display"] = {"basics"}
ROOMS["ranks"] = {"basics", "recipe", "display"}
ROOMS["models"] = {"basics", "recipe", "kernels"}
ROOMS["objectives"] = {"basics", "recipe", "models", "kernels"}
ROOMS["curriculum"] = {"basics", "recipe"}
ROOMS["sources"] = {"basics", "recipe"}
ROOMS["rewards"] = {"basics", "recipe", "display", "models"}
ROOMS["shards"] = {"basics", "recipe", "curriculum"}
ROOMS["preparing"] = set(ROOMS) - {"objectives", "kernels"}
ROOMS["training"] = set(ROOMS) - {"preparing"}
ROOMS["comparing"] = set(ROOMS) - {"shards", "curriculum"}
ROOMS["root"] = set(ROOMS)
# Functions that look for a word in what others say, or cut it themselves to hide passwords.
LOOKED_AT = {
    "told_by",
    "is_out_of_memory",
    "_is_of_a_collective",
    "_global_in",
    "_broken",
    "_remedy",
    "reason_of",
}
PROTOCOL = "cdpo.engine.models.protocol."  # all that an objective knows of a model
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


def room_of(name: str) -> str | None:
    """The room that a dotted name belongs to; None of what is not ours."""
    match name.split("."):
        case ["cdpo", "kernels", *_]:
            return "kernels"
        case ["cdpo", "engine", room, _, *_] if (ROOT / "engine" / room).is_dir():
            return room
        case ["cdpo", "engine", *_]:
            return "root"
    return None


def arrows() -> Iterator[tuple[str, str, str]]:
    """Importing room, imported room, and where: every import between rooms but `__version__`'s."""
    for path in SOURCES:
        folder, *inner = path.relative_to(ROOT).with_suffix("").parts
        if folder in ("engine", "kernels"):
            mine = room_of(".".join(["cdpo", folder, *inner])) or ""
            for line, name in imports(path):
                theirs = room_of(name)
                if theirs not in (None, mine) and not name.endswith(".__version__"):
                    yield mine, theirs, f"{relative(path)}:{line} imports {name}"


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


def test_rooms_import_what_the_table_lets_them():
    wrong = [where for mine, theirs, where in arrows() if theirs not in ROOMS[mine]]
    assert not wrong, "\n".join(wrong)


def test_the_table_has_no_circle_and_names_every_room():
    list(graphlib.TopologicalSorter(ROOMS).static_order())  # raises CycleError, naming the circle
    folders = {path.parent.name for path in (ROOT / "engine").glob("*/__init__.py")}
    assert folders == set(ROOMS) - {"kernels", "root"}


def test_an_objective_knows_of_models_their_protocol_alone():
    names = {
        where for mine, theirs, where in arrows() if (mine, theirs) == ("objectives", "models")
    }
    assert names and all(PROTOCOL in where for where in names), "\n".join(names)


def test_files_of_one_room_do_not_import_each_other_in_circles():
    for room in set(ROOMS) - {"root"}:
        folder = ROOT / room if room == "kernels" else ROOT / "engine" / room
        graph: dict[str, set[str]] = {}
        for path in folder.rglob("*.py"):
            mine = ".".join(["cdpo", *path.relative_to(ROOT).with_suffix("").parts])
            graph[mine] = {name.rpartition(".")[0] for _, name in imports(path)}
        list(graphlib.TopologicalSorter(graph).static_order())


def test_tests_mirror_the_rooms():
    tested = {path.name for path in (ROOT / "tests" / "engine").iterdir() if path.is_dir()}
    assert tested - {"__pycache__"} == set(ROOMS) - {"kernels", "root"}


def _our_errors() -> set[str]:
    """Names of the classes that derive from CdpoError, wherever they are."""
    ours, classes = {"CdpoError"}, list[ast.ClassDef]()
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        classes += [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    for _ in range(4):  # levels of inheritance
        ours |= {c.name for c in classes if any(getattr(b, "id", "") in ours for b in c.bases)}
    return ours


def _foreign_errors(tree: ast.AST, ours: set[str]) -> Iterator[tuple[str, ast.AST]]:
    """Names of caught or given errors of others, each with the code in which it is one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.name and node.type is not None:
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(getattr(kind, "id", None) not in ours for kind in kinds):
                yield node.name, node
        elif isinstance(node, ast.FunctionDef):
            for argument in node.args.args:
                kind = getattr(argument.annotation, "id", "")
                if kind.endswith(("Error", "Exception")) and kind not in ours:
                    yield argument.arg, node


def test_what_others_say_is_never_passed_on_as_it_is():
    """Not in f-strings, as str() or repr(), or by attributes that hold text: through `told_by`."""
    ours, bare = _our_errors(), set()
    assert "UnreadableImage" in ours
    for path in SOURCES:
        if not relative(path).startswith("engine/"):
            continue
        for name, code in _foreign_errors(ast.parse(path.read_text(encoding="utf-8")), ours):
            for node in ast.walk(code):
                match node:
                    case ast.FormattedValue(value=ast.Name(id=found)):
                        pass
                    case ast.Call(func=ast.Name(id="str" | "repr"), args=[ast.Name(id=found)]):
                        pass
                    case ast.Attribute(value=ast.Name(id=found), attr="strerror" | "args"):
                        pass
                    case _:
                        continue
                function = getattr(code, "name", None)
                if found == name and function not in LOOKED_AT:
                    bare.add(f"{relative(path)}:{node.lineno}")
    assert not bare, "\n".join(sorted(bare))


def test_every_error_of_ours_says_its_kind():
    """And its key where there is one: scripts and tests go by those, messages may be reworded."""
    ours = {name for name, kind in vars(errors).items() if isinstance(kind, type)} - {
        "StopRequested"
    }
    silent = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ours:
                place = 4 if node.func.id == "ShardError" else 2  # type: ignore[attr-defined]
                named = any(keyword.arg == "kind" for keyword in node.keywords)
                if not named and len(node.args) <= place:
                    silent.append(f"{relative(path)}:{node.lineno}")
    assert not silent, "\n".join(silent)
