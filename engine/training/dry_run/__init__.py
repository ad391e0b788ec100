"""What a recipe will take before it is run: FLOPs, bytes, steps, without a GPU."""
