"""One HTML page of a run, a comparison or any set of runs, in a single file that needs no network."""
