"""A verb for which the system refuses one path: not to be written (`EROFS`), not even opened
(`EACCES`), or no room (`ENOSPC`) in it or beneath.

    CDPO_VERB=train CDPO_REFUSE=EROFS CDPO_PLACE=/run/samples python refusing.py --recipe ...

Root may do all of that, whatever the permissions say: so it is refused where Python asks. What
libraries do behind its back (torch's and safetensors' own files) is not; tests/faults/
test_full_disks.py has a disk that is full for all.
"""

import errno
import os
import runpy
import sys
from pathlib import Path
from typing import Any

PLACE, ERROR = os.environ["CDPO_PLACE"], getattr(errno, os.environ["CDPO_REFUSE"])
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate")


def is_meant(path: object) -> bool:
    if not isinstance(path, str | bytes | os.PathLike):
        return False
    text = os.path.abspath(os.fsdecode(path))
    return text == PLACE or text.startswith((PLACE + os.sep, PLACE + ".tmp"))


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        path, _, flags = arguments
        asked = bool(flags & WRITES) or ERROR == errno.EACCES
        paths = (path,)
    elif event in CHANGES:
        asked = ERROR != errno.ENOSPC or event not in ("os.remove", "os.rmdir")
        paths = arguments[:2] if event == "os.rename" else arguments[:1]
    elif event in ("os.listdir", "os.scandir"):
        asked, paths = ERROR == errno.EACCES, arguments[:1]
    else:
        return
    for path in paths:
        if asked and is_meant(path):
            raise OSError(ERROR, os.strerror(ERROR), os.fsdecode(path))


really = os.access


def access(path: Any, mode: int, **options: Any) -> bool:
    refused = ERROR == errno.EACCES or (ERROR == errno.EROFS and bool(mode & os.W_OK))
    return not (refused and is_meant(path)) and really(path, mode, **options)


os.access = access  # type: ignore[assignment]
sys.addaudithook(refuse)
script = Path(__file__).resolve().parents[2] / "engine" / f"{os.environ['CDPO_VERB']}.py"
runpy.run_path(str(script), run_name="__main__")
