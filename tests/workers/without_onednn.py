"""Runs the verb VERB without oneDNN, whose convolutions are blocked by the size of the caches."""

import os
import runpy
from pathlib import Path

import torch

torch.backends.mkldnn.enabled = False
verb = Path(__file__).parents[2] / "engine" / f"{os.environ['VERB']}.py"
runpy.run_path(str(verb), run_name="__main__")
