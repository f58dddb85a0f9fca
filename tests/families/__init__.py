"""Every causal-LM configuration of transformers as a small random model: what recon accepts and recovers."""
