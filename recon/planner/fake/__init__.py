"""A model without data: its steps taken on fake tensors, whose bytes are counted."""
