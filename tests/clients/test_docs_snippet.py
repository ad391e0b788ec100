"""The lines with which docs/models.md loads an adapter, run as they are printed."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from cdpo.engine.models import sd
from cdpo.engine.models.adapters import add_lora
from cdpo.engine.recipe import Adapter, Model
from cdpo.engine.training.export_formats import save_for_all
from cdpo.engine.training.lora import trained_lora
from diffusers import DiffusionPipeline
from peft import get_peft_model_state_dict

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "assets" / "emoji" / "sd"  # in half precision


def test_the_snippet_loads_an_adapter_of_the_demos_own_base(tmp_path: Path) -> None:
    model, spec = Model(path=str(DEMO), resolution=(32, 32)), Adapter(rank=2, alpha=1.0)
    backbone = sd.load(model, torch.device("cpu"), torch.float32)
    policy = add_lora(backbone.denoiser, spec, seed=0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.1)
    lora = trained_lora(get_peft_model_state_dict(policy), spec)
    save_for_all(lora, backbone.pipeline, {}, tmp_path / "lora")

    text = (ROOT / "docs" / "models.md").read_text()
    (snippet,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.S) if "lora" in code]
    snippet = snippet.replace("stable-diffusion-v1-5/stable-diffusion-v1-5", str(DEMO))
    names: dict[str, DiffusionPipeline] = {}
    exec(snippet.replace("runs/my/lora", str(tmp_path / "lora")), names)  # noqa: S102

    def draw() -> np.ndarray:
        size = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}
        generator = torch.Generator().manual_seed(0)
        return names["pipeline"]("red apple", generator=generator, **size).images

    tuned = draw()
    names["pipeline"].disable_lora()
    assert np.abs(tuned - draw()).max() > 0.01
