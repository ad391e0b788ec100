"""pandas and Hugging Face's datasets read what stage 1 leaves behind.

They lie in `build/table_clients`, where `make test-all` installs them, and run in a process of
their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import preferences
import pyarrow.parquet as pq
import pytest
from prepared import OVERRIDES, ROWS, named, pairs_of, prepare

LIBRARIES = Path(__file__).parents[2] / "build" / "table_clients"
READ = """
import json, sys
import datasets, pandas
run, cache = sys.argv[1:]
pairs = datasets.load_dataset(
    "webdataset", data_files=f"{run}/shards/*.tar", split="train", cache_dir=cache
)
found = {
    "pairs": {pair["json"]["pair_id"]: pair["latents.npy"] for pair in pairs},
    "scores": json.loads(pandas.read_parquet(f"{run}/scores.parquet").to_json(orient="records")),
    "left_out": pandas.read_csv(f"{run}/left_out.csv").reason.value_counts().to_dict(),
}
print(json.dumps(found))
"""

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not (LIBRARIES / "installed").exists(),
        reason=f"none in {LIBRARIES}: make test-all installs them where an index is reached",
    ),
]


def test_pairs_scores_and_what_is_left_out(tiny_recipe, ranks, tmp_path):
    preferences.write_parquet(tmp_path / "data" / "0.parquet", ROWS)
    recipe = tiny_recipe(*OVERRIDES["paired"], f"prepare.source.path={tmp_path / 'data'}")
    shards = prepare(recipe, ranks)
    env = os.environ | {"PYTHONPATH": str(LIBRARIES)}
    command = [sys.executable, "-c", READ, recipe.run_dir, str(tmp_path / "cache")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    ours = {str(meta.pair_id): latents for meta, latents in pairs_of(shards)}
    assert ours and found["pairs"].keys() == ours.keys()
    for pair, latents in found["pairs"].items():
        assert np.array_equal(np.float16(latents), ours[pair])
    scores = pq.read_table(Path(recipe.run_dir) / "scores.parquet").to_pylist()
    for row, own in zip(found["scores"], scores, strict=True):
        assert row == pytest.approx(own, abs=1e-6, nan_ok=True)
    reasons = Counter(line["reason"] for line in named(Path(recipe.run_dir)))
    assert reasons and found["left_out"] == reasons
