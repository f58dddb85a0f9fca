"""Quality of a model: perplexity, and drift from the dense model, whole or block by block."""
