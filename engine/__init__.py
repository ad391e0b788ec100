"""The engine of cdpo: prepare preference pairs, train on them tier by tier, compare the outcome."""

__version__ = "0.1.0"
