"""``python -m cdpo.engine.shards``: the same as ``cdpo shards``."""

import sys

from .tools.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
