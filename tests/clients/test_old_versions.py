"""The oldest libraries that are still about load what we write, and draw what the newest do.

They lie in `build/old_clients`, where `make test-all` installs them, and run in a process of their
own beside today's torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from cdpo.engine.models import sd
from cdpo.engine.models.adapters import add_lora
from cdpo.engine.recipe import Adapter, Model
from cdpo.engine.training.export_formats import save_for_all, save_merged
from cdpo.engine.training.lora import trained_lora
from diffusers import PNDMScheduler
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

OLD = Path(__file__).parents[2] / "build" / "old_clients"
SPECS = {
    "lora": Adapter(rank=2, alpha=1.0, targets="lcm"),
    "rslora": Adapter(rank=4, alpha=3.0, targets="lcm", rslora=True),
    "dora": Adapter(rank=2, alpha=3.0, targets="lcm", dora=True),
}
DRAW = """
import sys
import numpy, torch
from diffusers import DiffusionPipeline
base, folder, out = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32)
if folder:
    pipeline.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
noise = torch.Generator().manual_seed(0)
size = {"height": 16, "width": 16, "num_inference_steps": 4, "output_type": "np"}
numpy.save(out, pipeline("red apple", generator=noise, **size).images)
"""

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not (OLD / "installed").exists(),
        reason=f"no old libraries in {OLD}: make test-all installs them where an index is reached",
    ),
]


def drawn(folder: Path, base: Path, adapter: str, libraries: Path | None) -> np.ndarray:
    """A picture (1, 16, 16, 3) in [0, 1], by the libraries in a folder, or by those of today."""
    env = dict(os.environ)
    if libraries is not None:
        env["PYTHONPATH"] = str(libraries)
    out = folder / "picture.npy"
    command = [sys.executable, "-c", DRAW, str(base), adapter, str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return np.load(out)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As those on the hub: by transformers 4, whose text encoders' tensors have a prefix."""
    folder = tmp_path_factory.mktemp("old") / "sd"
    pipeline = tiny.pipeline()
    pipeline.scheduler = PNDMScheduler(skip_prk_steps=True, beta_schedule="scaled_linear")
    pipeline.save_pretrained(folder)
    shutil.rmtree(folder / "tokenizer")  # theirs is of two files
    shutil.copytree(tiny.TOKENIZER, folder / "tokenizer")
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    save_file(
        {f"text_model.{name}": value for name, value in tensors.items()}, path, {"format": "pt"}
    )
    return folder


@pytest.mark.parametrize("name", SPECS)
def test_old_libraries_draw_what_new_ones_draw(base: Path, tmp_path: Path, name: str) -> None:
    model, spec = Model(path=str(base), resolution=(16, 16)), SPECS[name]
    backbone = sd.load(model, torch.device("cpu"), torch.float32)
    policy = add_lora(backbone.denoiser, spec, seed=0)
    generator = torch.Generator().manual_seed(1)
    for key, parameter in policy.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_(0, 0.3, generator=generator)
        if "magnitude" in key:
            parameter.data *= torch.rand(parameter.shape, generator=generator) + 0.5
    lora = tmp_path / "lora"
    adapter = trained_lora(get_peft_model_state_dict(policy), spec)
    save_for_all(adapter, backbone.pipeline, {}, lora)
    save_merged(model, lora, tmp_path / "merged", 10**9)
    untuned = drawn(tmp_path, base, "", None)
    wanted = drawn(tmp_path, base, str(lora), None)
    assert np.abs(wanted - untuned).max() > 0.02
    for place, folder in ((base, str(lora)), (tmp_path / "merged", "")):
        assert np.abs(drawn(tmp_path, place, folder, OLD) - wanted).max() < 1e-4
