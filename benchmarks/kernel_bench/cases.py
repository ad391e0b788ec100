"""The registry of `bench_kernels.py`: which kernels, at which models and batches.

A kernel takes part by a function that yields its cases at one model and batch, in a file such as
`latent_cases.py`, and by its line in FAMILIES.
"""

from collections.abc import Callable, Iterator

from kernel_bench import latent_cases, layer_cases, lcm_cases
from kernel_bench.case import Case

BATCHES = (1, 2, 4, 8, 16, 32, 64)  # pairs
LAYER_BATCHES = (1, 8, 64)  # a UNet has some twenty shapes, each compiled anew for each batch

Family = Callable[[str, int], Iterator[Case]]  # (model, pairs) -> cases
FAMILIES: dict[Family, tuple[int, ...]] = {  # with the batches it runs at
    latent_cases.paired_dpo_loss_cases: BATCHES,
    latent_cases.philox_normal_cases: BATCHES,
    latent_cases.paired_add_noise_cases: BATCHES,
    lcm_cases.consistency_cases: BATCHES,
    layer_cases.group_norm_silu_cases: LAYER_BATCHES,
    layer_cases.geglu_cases: LAYER_BATCHES,
}


def cases(models: list[str], batches: list[int] | None, kernels: str) -> list[Case]:
    """The cases of all kernels whose name contains `kernels`."""
    found = [
        case
        for family, usual in FAMILIES.items()
        for model in models
        for pairs in batches or usual
        for case in family(model, pairs)
        if kernels in case.kernel
    ]
    names = list(dict.fromkeys(case.kernel for case in found))
    return sorted(found, key=lambda case: names.index(case.kernel))
