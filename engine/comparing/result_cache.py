"""Small tables that took long to compute, kept beside a record of what they were made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..basics.files import replacing
from ..basics.keyed import content_id

Tables = dict[str, NDArray[np.float64]]


class KeptTables:
    """Tables of float64 by name, a file for each subject; none that was made of something else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, subject: str, made_of: Mapping[str, str]) -> Tables | None:
        """The tables of a subject; None if there are none, of these ingredients and whole."""
        try:
            with safe_open(self._path(subject), framework="np") as file:
                if file.metadata() != {"subject": subject, **made_of}:
                    return None
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return None

    def write(
        self, subject: str, made_of: Mapping[str, str], tables: Mapping[str, NDArray[np.float64]]
    ) -> None:
        """Keep tables; they appear when they are whole. DataError when the disk is full."""
        data = {name: np.ascontiguousarray(table, np.float64) for name, table in tables.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self._path(subject)) as file:
            file.write(save(data, metadata={"subject": subject, **made_of}))

    def _path(self, subject: str) -> Path:
        return self.folder / f"{content_id(subject):016x}.safetensors"
