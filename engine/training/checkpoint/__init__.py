"""Committed snapshots of a run: their files, what ZeRO divides among ranks, and its rejoining."""
