"""Which weights survive: criteria under patterns, masks, and the walk through the model."""
