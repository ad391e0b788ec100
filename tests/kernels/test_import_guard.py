"""The folder is named like a package that transformers and diffusers import: `kernels`."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter with the paths first, as scripts and pytest put them."""
    prelude = f"import sys; sys.path[:0] = {[str(folder) for folder in path]!r}\n"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error::ImportWarning", "-c", prelude + textwrap.dedent(code)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def succeeds(code: str, *path: Path) -> None:
    run = python(code, *path)
    assert run.returncode == 0, run.stderr


def test_libraries_and_ops_with_our_folders_first():
    """As scripts have them: their own folder, then the root, which pytest puts there too."""
    succeeds(
        """
        import transformers, diffusers
        from diffusers import UNet2DConditionModel
        from transformers import CLIPModel
        from transformers.utils import is_kernels_available
        import cdpo.engine.recipe.schema
        import cdpo.kernels, torch
        names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("cdpo::")]
        assert len(names) == len(set(names)) and "cdpo::paired_dpo_loss" in names, names
        assert cdpo.kernels.paired_dpo_loss.__module__ == "cdpo.kernels.paired_dpo_loss.op"
        """,
        *(ROOT / name for name in ("engine", "benchmarks", ".")),
    )


@pytest.mark.parametrize("linked", [False, True])
def test_plain_name_exports_and_registers_nothing(linked, tmp_path):
    if linked:
        (tmp_path / "kernels").symlink_to(ROOT / "kernels", target_is_directory=True)
    succeeds(
        """
        import importlib.metadata
        try:
            importlib.metadata.version("kernels")
            sys.exit()  # the real one is installed: the next test is about that
        except importlib.metadata.PackageNotFoundError:
            pass
        import kernels
        assert "torch" not in sys.modules
        import torch
        assert not [name for name in vars(kernels) if not name.startswith("_")], vars(kernels)
        assert not any(n.startswith("cdpo::") for n in torch._C._dispatch_get_all_op_names())
        try:
            import kernels.paired_dpo_loss
        except ImportError:
            sys.exit()
        sys.exit("kernels.paired_dpo_loss must not be importable")
        """,
        tmp_path if linked else ROOT,
    )


def test_real_package_is_found_behind_ours(tmp_path):
    """With PyPI's package installed, the plain name means it, though our root comes first."""
    real = tmp_path / "kernels"
    (real / "inner").mkdir(parents=True)
    (real / "inner" / "__init__.py").write_text("value = 7\n")
    (real / "__init__.py").write_text("from .inner import value\ndef get_kernel(): return value\n")
    (tmp_path / "kernels-9.9.dist-info").mkdir()
    (tmp_path / "kernels-9.9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kernels\nVersion: 9.9\n"
    )
    succeeds(
        f"""
        from kernels import get_kernel
        import kernels, cdpo.kernels
        import kernels.inner
        assert get_kernel() == 7
        assert kernels.__file__ == {str(real / "__init__.py")!r}, kernels.__file__
        assert kernels.__spec__.origin == kernels.__file__
        assert not hasattr(kernels, "paired_dpo_loss")
        assert not hasattr(cdpo.kernels, "get_kernel")
        """,
        ROOT,
        tmp_path,
    )
