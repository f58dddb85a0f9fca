"""Comparisons: which cells there are, each in a process of its own, tuned options, results."""
