"""Custom kernels of cdpo, a file or a folder each; import them as `cdpo.kernels`.

This folder is called `kernels`, and so is a package on PyPI that transformers and diffusers import
when it is installed. With the repository's root on `sys.path` Python finds this folder under that
plain name. It then registers nothing and hands the name over to the real package, if there is one.
"""


def _hand_over() -> None:
    """Let the next `kernels` on `sys.path` run in this module's place."""
    import sys
    from importlib.machinery import PathFinder
    from pathlib import Path

    here = Path(__file__).resolve().parent
    elsewhere = [entry for entry in sys.path if Path(entry, "kernels").resolve() != here]
    module, spec = sys.modules[__name__], PathFinder.find_spec("kernels", elsewhere)
    if spec is None or spec.origin is None or spec.loader is None:
        module.__path__ = []  # no submodules: they would register the ops a second time
        return
    module.__spec__, module.__file__ = spec, spec.origin
    module.__path__ = list(spec.submodule_search_locations or [])
    spec.loader.exec_module(module)


if __name__ == "kernels":
    _hand_over()
else:
    from .consistency_step import (
        ConsistencyScales,
        SchedulePoint,
        consistency_scales,
        consistency_solver_step,
        consistency_targets,
    )
    from .dispatch import use
    from .fuse import fuse, unfuse
    from .geglu import geglu
    from .group_norm_silu import group_norm_silu
    from .paired_add_noise import paired_add_noise
    from .paired_dpo_loss import PairedDifferences, PairedLoss, paired_differences, paired_dpo_loss
    from .philox import philox_normal, philox_uint32

    __all__ = [
        "ConsistencyScales",
        "PairedDifferences",
        "PairedLoss",
        "SchedulePoint",
        "consistency_scales",
        "consistency_solver_step",
        "consistency_targets",
        "fuse",
        "geglu",
        "group_norm_silu",
        "paired_add_noise",
        "paired_differences",
        "paired_dpo_loss",
        "philox_normal",
        "philox_uint32",
        "unfuse",
        "use",
    ]
