"""A verb for which the system lets no file grow beyond a size, as a full disk would.

    CDPO_VERB=train CDPO_LARGEST=65536 python no_large_file.py --recipe ...

It holds for what libraries write in C++ and Rust, too, and takes no mount and no root.
"""

import os
import resource
import runpy
from pathlib import Path

_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["CDPO_LARGEST"]), most))
script = Path(__file__).resolve().parents[2] / "engine" / f"{os.environ['CDPO_VERB']}.py"
runpy.run_path(str(script), run_name="__main__")
