"""Zero-shot and generation tasks, scored by lm-evaluation-harness on a model in memory."""
