"""Tiny random models of many causal-LM families: the same code paths as the real ones, in milliseconds."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY, DIM, DEPTH, HEADS = 96, 32, 3, 4

_MODERN = {
    "hidden_size": DIM,
    "intermediate_size": 64,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_PLAIN = {key: value for key, value in _MODERN.items() if key != "num_key_value_heads"}
_GPT = {"n_embd": DIM, "n_layer": DEPTH, "n_head": HEADS, "n_positions": 64}
_GEMMA = {**_MODERN, "head_dim": 8, "sliding_window": 6}

# Model type -> sizes. Special tokens are set below for all, since their defaults exceed the vocabulary.
FAMILIES: dict[str, dict] = {
    "llama": _MODERN,
    "mistral": {**_MODERN, "sliding_window": 6},
    "qwen2": _MODERN,
    "qwen3": {**_MODERN, "head_dim": 8},
    "gemma2": _GEMMA,
    "gemma3_text": {**_GEMMA, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "olmo2": _MODERN,
    "stablelm": _MODERN,
    "cohere": _MODERN,
    "phi": _PLAIN,
    "phi3": _MODERN,
    "gpt_neox": _PLAIN,
    "opt": {**_PLAIN, "ffn_dim": 64, "word_embed_proj_dim": 16},
    "gpt2": _GPT,
    "gptj": {**_GPT, "rotary_dim": 4},
    "gpt_neo": {**_PLAIN, "num_layers": DEPTH, "attention_types": [[["global", "local", "global"], 1]]},
    "falcon": _PLAIN,
    "bloom": {"hidden_size": DIM, "n_layer": DEPTH, "n_head": HEADS},
    "mpt": {"d_model": DIM, "n_layers": DEPTH, "n_heads": HEADS, "max_seq_len": 64},
}


_EXPERTS = {**_MODERN, "head_dim": 8, "num_experts_per_tok": 2}
_NARROW = {**_EXPERTS, "moe_intermediate_size": 24}
_DEEPSEEK = {
    **_NARROW,
    "num_key_value_heads": HEADS,
    "n_routed_experts": 4,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}

# As above, of models whose experts lie in parameters of three dimensions.
MIXTURES: dict[str, dict] = {
    "mixtral": {**_EXPERTS, "num_local_experts": 4},
    "qwen3_moe": {**_NARROW, "num_experts": 4},
    "gpt_oss": {**_EXPERTS, "num_local_experts": 4, "sliding_window": 6},
    "llama4_text": {**_EXPERTS, "num_local_experts": 4, "intermediate_size_mlp": 64, "num_experts_per_tok": 1},
    "jetmoe": {**_EXPERTS, "num_local_experts": 4, "kv_channels": 8},
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "olmoe": {**_EXPERTS, "num_experts": 4},
    "flex_olmo": {**_EXPERTS, "num_experts": 4},
    "glm4_moe": {**_NARROW, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "dots1": {**_NARROW, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "granitemoe": {**_EXPERTS, "num_local_experts": 4},
    "qwen2_moe": {**_NARROW, "num_experts": 4, "shared_expert_intermediate_size": 32},
    "ernie4_5_moe": {**_NARROW, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    "phimoe": {**_EXPERTS, "num_local_experts": 4},
    "minimax": {**_EXPERTS, "num_local_experts": 4, "layer_types": ["full_attention"] * DEPTH},
    "hunyuan_v1_moe": {**_EXPERTS, "num_experts": 4, "moe_topk": 2},
    "afmoe": {**_NARROW, "num_experts": 4, "num_dense_layers": 1},
    "cohere2_moe": {**_NARROW, "num_experts": 4},
}


def tiny(family: str, **overrides: object) -> PreTrainedModel:
    """A model of the given `model_type` in eval mode; weights depend on nothing but the arguments."""
    special_tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {"vocab_size": VOCABULARY, **special_tokens, **(FAMILIES | MIXTURES).get(family, _MODERN), **overrides}
    config = AutoConfig.for_model(family, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # no weight at its initial 0 or 1, where mistakes hide
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def token_ids(batch: int = 2, seq: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token ids of shape [batch, seq]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (batch, seq), generator=generator)
