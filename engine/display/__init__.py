"""What people see while something runs: terminal, progress, grids of pictures."""
