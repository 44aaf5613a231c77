"""Products by sums of shifted values, for a pass that is asked for by name."""
