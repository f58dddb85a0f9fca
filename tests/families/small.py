"""A small random model of every causal-LM configuration that the installed transformers knows.

Sizes are set by the names of a configuration's own fields, in its sub-configurations too. Lists with one entry a layer
are thinned to four entries that keep each kind of layer. A family that these rules do not fit has a line of its own.
"""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

DEPTH = 4
MODEL_TYPES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

DEPTHS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
    "encoder_layers",
)
ALWAYS = ("head_dim", "num_key_value_heads", "bos_token_id", "eos_token_id", "pad_token_id", "is_encoder_decoder")
SIZES: dict[str, Any] = {
    **dict.fromkeys(DEPTHS, DEPTH),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim", "emb_dim"), 64
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "dff", "dim_ff", "n_inner"), 64),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size", "feed_forward_size", "ffn_hidden_size"), 64),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("swa_num_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "swa_head_dim", "attention_head_size", "dim_head"), 16),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "zero_expert_num"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("expert_ffn_hidden_size",), 32),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "index_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("index_topk", "hc_lowrank", "rotary_dim"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "mamba_d_head", "mamba_head_dim", "conv_dim"), 16),
    **dict.fromkeys(("mamba_num_heads", "mamba_n_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_ssm", "lru_width", "router_hidden_size"), 128),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "local_attention"), 8),
    **dict.fromkeys(("index_n_heads",), 2),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "time_step_rank", "mamba_dt_rank"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "rel_extent"), 128),
    "vocab_size": 96,
    "is_encoder_decoder": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

_NOTE = {"num_attention_heads": 4, "num_key_value_heads": 4}
_INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8}
_QWEN4 = {**_INDEXER, "indexer_compress_ratio": 2, "ple_embed_dim": 32, "ngram_vocab_size_base": 96}
_GEMMA = {"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8}
OWN: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * DEPTH,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 32, "hidden_size": 64, "moe_top_k": 2},
    },
    "dots1": {"moe_intermediate_size": 32, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "blt": {"encoder_hash_byte_group_vocab": 96},
    "dots3_note_text": _NOTE,
    "gemma3n_text": {**_GEMMA, "num_kv_shared_layers": 0, "intermediate_size": 64, "laurel_rank": 8},
    "gemma4": {"text_config": _GEMMA},
    "gemma4_text": _GEMMA,
    "bamba": {"attn_layer_indices": [1, 3]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots3_note": {"text_config": _NOTE, "audio_config": {"adapter_in_dim": 64, "hidden_size": 64, "d_model": 64}},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"lru_width": 64},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 16]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
"""Sizes of families that the rules do not fit."""


def _sizes(config: PreTrainedConfig, own: dict[str, Any]) -> dict[str, Any]:
    """Choose the fields of a configuration that make its model small."""
    fields = config.to_dict()
    sizes = {name: size for name, size in SIZES.items() if name in fields and (name in ALWAYS or fields[name])}
    if "kv_lora_rank" in fields:  # keys and values of all heads come from one latent vector
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    depth = next((fields[name] for name in DEPTHS if fields.get(name)), 0)
    lists = {name: one for name, one in fields.items() if isinstance(one, list) and len(one) == depth > DEPTH}
    kinds = [repr(kind) for kind in zip(*lists.values(), strict=True)]
    first = [index for index, kind in enumerate(kinds) if kind not in kinds[:index]]
    rest = [index for index in range(len(kinds)) if index not in first]
    layers = sorted([*first, *rest][:DEPTH])
    sizes |= {name: [one[index] for index in layers] for name, one in lists.items()}
    for name in getattr(config, "sub_configs", {}):
        inner = getattr(config, name, None)
        if inner is not None:
            sizes[name] = {"model_type": inner.model_type, **_sizes(inner, own.get(name, {}))}
    return sizes | {name: value for name, value in own.items() if name not in sizes or not isinstance(value, dict)}


def small_shape(model_type: str, vocabulary: int = SIZES["vocab_size"]) -> dict[str, Any]:
    """Choose the fields of the configuration of a small model, `model_type` included."""
    sizes = _sizes(AutoConfig.for_model(model_type), OWN.get(model_type, {}))
    return {"model_type": model_type, **_with_vocabulary(sizes, vocabulary)}


def small_config(model_type: str) -> PreTrainedConfig:
    """Make the configuration of a small model of this type."""
    return AutoConfig.for_model(**small_shape(model_type))


def _with_vocabulary(sizes: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    inner = {name: _with_vocabulary(one, vocabulary) for name, one in sizes.items() if isinstance(one, dict)}
    return sizes | inner | ({"vocab_size": vocabulary} if "vocab_size" in sizes else {})


def small_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Make a model with random weights in eval mode; the weights depend on nothing but the configuration."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
