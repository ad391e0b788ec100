"""Custom kernels of cdpo, one file each; import them as `cdpo.kernels`.

This folder is called `kernels`, and so is a package on PyPI that transformers and diffusers import
when it is installed. With the repository's root on `sys.path` Python may find this folder under
that plain name. It then registers nothing and hands the name over to the real package, if any.
"""

if __name__ == "kernels":
    import sys
    from importlib.machinery import PathFinder
    from pathlib import Path

    _root = Path(__file__).resolve().parent.parent
    _spec = PathFinder.find_spec(
        "kernels", [entry for entry in sys.path if Path(entry or ".").resolve() != _root]
    )
    __path__ = list((_spec and _spec.submodule_search_locations) or [])
    if _spec is not None and _spec.loader is not None and _spec.origin is not None:
        __spec__, __file__ = _spec, _spec.origin
        _spec.loader.exec_module(sys.modules[__name__])
else:
    from .dispatch import use
    from .paired_dpo_loss import PairedLoss, paired_dpo_loss
    from .philox import philox_normal, philox_uint32

    __all__ = ["PairedLoss", "paired_dpo_loss", "philox_normal", "philox_uint32", "use"]
