"""Shapes of tiny models for commands that make one at random."""

import json
from typing import Any

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TIED_LLAMA = {**LLAMA, "tie_word_embeddings": True}
PLANNED: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
"""What tests of the planner count by hand."""


def random_model(shape: dict[str, Any]) -> list[str]:
    """Options of a command for a random model of this shape."""
    return ["--model.name=random", f"--model.shape={json.dumps(shape)}"]
