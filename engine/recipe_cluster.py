"""Section of a recipe: what the run may expect of the machines it runs on."""

from __future__ import annotations

from .recipe_types import PositiveFloat, Section


class Cluster(Section):
    """How long to wait, for other ranks and before leaving."""

    timeout_minutes: PositiveFloat = 30.0
    """Longest wait of a rank for the others, in minutes; then the run ends instead of hanging.
    More than the slowest rank is ever late, e.g. in writing a large checkpoint."""
    grace_seconds: PositiveFloat = 300.0
    """Seconds from a request to stop (SIGTERM, in all three verbs) to leaving even without having
    come to a safe point. Give it what the cluster gives, e.g. Slurm's `--signal=TERM@300`."""
