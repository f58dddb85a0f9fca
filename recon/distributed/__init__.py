"""Processes of a run, their parts of the work, and parameters wherever a strategy keeps them."""
