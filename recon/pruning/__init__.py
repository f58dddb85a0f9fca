"""Choice of the surviving weights: criteria, patterns, allocations, masks, and the walk through the model."""
