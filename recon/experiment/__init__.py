"""A run from dense model to report, and comparisons of runs."""
