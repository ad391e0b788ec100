"""The curriculum: ranks, pairs and difficulty tiers of candidates, and when each tier opens."""
