"""What everything rests on: errors, atomic files, keyed randomness, fail-points, versions."""
