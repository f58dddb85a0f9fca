"""Models of any family: loading, anatomy, and their parts run by their own code."""
