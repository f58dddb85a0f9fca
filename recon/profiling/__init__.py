"""Memory of a run: by process, by phase, by category of live tensors."""
