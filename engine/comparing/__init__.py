"""Evidence: base and tuned models side by side, their scores, distances and report."""
