"""Where fingerprints are kept between starts, so that files which have not changed are not read to
know what they hold.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from ..basics.files import replacing, user_cache
from ..basics.shipped import locate
from ..recipe import Model
from .pretrained import HUB_ID

FORMAT = 2  # raised when a fingerprint is made otherwise: what the store holds is then forgotten
SETTLED = 2.0  # seconds; a file that is younger may change again within one tick of its times


class Kept:
    """Fingerprints of what is read from some files, kept for the next start in `~/.cache/cdpo`.

    They are known by the files' real paths, sizes, times and inodes, so nothing is read to find
    them. Where the store cannot be written they are computed anew each time.
    """

    def __init__(self, what: Sequence[object], places: Iterable[tuple[str, str | None]]) -> None:
        """To be made before the files are read.

        Args:
            what: all else that the fingerprints are a function of, as JSON has it.
            places: files, folders or hub ids, each with its revision.
        """
        self._what, self._places = what, tuple(places)
        self._before, _ = self._state()

    def read(self) -> dict[str, str] | None:
        """What is known of these files; None if nothing is."""
        state, _ = self._state()
        if state is None or self._before not in (None, state):
            return None
        try:
            found = json.loads(_path(state).read_bytes())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def keep(self, found: Mapping[str, str]) -> None:
        """Remember it, unless the files have changed meanwhile or are too young to tell."""
        state, newest = self._state()
        if state is None or self._before not in (None, state) or time.time() - newest < SETTLED:
            return
        # Ranks that write it at once write the same.
        with suppress(OSError), replacing(_path(state), error=None) as file:
            file.write(json.dumps(dict(found)).encode())

    def _state(self) -> tuple[str | None, float]:
        """The files as they are now, None if some are not here; when the newest changed."""
        files: list[list[object]] = []
        newest = 0.0
        for name, revision in self._places:
            found = _files(name, revision)
            if not found:
                return None, newest
            for path in found:
                try:
                    stat = path.stat()
                except OSError:
                    return None, newest
                times = stat.st_mtime_ns, stat.st_ctime_ns
                files.append([os.path.realpath(path), stat.st_size, *times, stat.st_ino])
                newest = max(newest, max(times) / 1e9)
        state = json.dumps([FORMAT, *self._what, files]) if files else None
        return state, newest


def _path(state: str) -> Path:
    name = hashlib.sha256(state.encode()).hexdigest()
    return user_cache() / "fingerprints" / f"{name}.json"


def _files(name: str, revision: str | None) -> list[Path]:
    """A file, or those of a folder or of a snapshot in the hub's cache and of their subfolders."""
    place = locate(name)
    if not os.path.exists(place):
        if not HUB_ID.fullmatch(place):
            return []
        try:
            place = snapshot_download(place, revision=revision, local_files_only=True)
        except Exception:  # whatever it is: nothing is known then
            return []
    path = Path(place)
    inner = [path] if path.is_file() else sorted([*path.glob("*"), *path.glob("*/*")])
    return [found for found in inner if found.is_file()]


def model_files(spec: Model, dtype: torch.dtype, text: str | None = None) -> Kept:
    """The fingerprints of a recipe's model, all but its teacher's, with its networks in a dtype;
    that of its ``text`` if it stands in for text encoders, which may not be among the files.
    """
    replaced = {key: getattr(spec, key) for key in ("vae", "unet", "lcm_lora")}
    given = {key: path for key, path in replaced.items() if path is not None}
    places = [(spec.path, spec.revision), *((path, None) for path in given.values())]
    what = ["model", spec.backbone, spec.variant, str(dtype), list(given)]
    return Kept(what if text is None else [*what, text], places)
