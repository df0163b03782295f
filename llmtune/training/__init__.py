"""Training: one step, one loop, one checkpoint format for every objective."""
