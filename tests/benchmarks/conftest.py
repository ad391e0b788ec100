"""Scripts of benchmarks/ import each other as neighbours; tests find them in the same way."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
