"""Processes that work together: how a verb starts, agrees, stops and leaves on all of them."""

from .group import Ranks
from .launch import run_verb

__all__ = ["Ranks", "run_verb"]
