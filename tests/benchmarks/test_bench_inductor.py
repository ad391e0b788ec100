"""What inductor's kernels are said to issue follows from what they do."""

from pathlib import Path

import pytest


@pytest.mark.long
def test_inductor_issues_a_few_instructions_for_a_gated_residual(tmp_path: Path) -> None:
    import bench_inductor as bench

    rows = ((2, 256, 512), bench.HALF)
    gated = bench.Layer("gated", bench.gated, [rows, ((2, 512), bench.HALF), rows], 6)
    with bench.imagined_gpu():
        [kernel] = bench.launches(bench.written(gated), tmp_path)
        each = {bench.issued(launch, bench.compiled(launch), trips) for launch, trips in kernel}
    # A product and a sum, three loads and a store; with addresses and conversions some ten.
    assert 4 <= min(each) / gated.elements <= 12
