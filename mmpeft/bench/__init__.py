"""Fair comparisons: what methods cost and what they reach, in one table."""
