"""Models whose blocks cannot be replayed or split: each is refused with a reason, or is left whole."""

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from recon.models.anatomy import Anatomy
from recon.models.calls import Call, record_calls
from recon.models.forwards import Form
from recon.models.windows import (
    submodule_windows,
)
from tests.support.families import DEPTH, DIM, tiny, token_ids
from tests.support.replays import NAMES, replay_of


def test_arguments_that_depend_on_the_tokens_are_refused() -> None:
    model = tiny("gemma4_text", head_dim=8, hidden_size_per_layer_input=8, vocab_size_per_layer_input=96)
    with pytest.raises(ValueError, match=r"A replayed block must.*model\.layers\.0 differs by"):
        replay_of(model)


def side_by_side() -> PreTrainedModel:
    """A model whose experts lie side by side in one matrix, and whose attention returns the residual stream, too."""
    experts = {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": DIM}
    attention = {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}
    sizes = {"d_model": DIM, "n_layers": DEPTH, "n_heads": 4}
    return tiny("dbrx", **sizes, attn_config=attention, ffn_config=experts)


def test_an_attention_that_returns_more_than_its_output_is_refused() -> None:
    model = side_by_side()
    for block in model.transformer.blocks:
        block.ffn = torch.nn.Linear(DIM, DIM)
    with pytest.raises(ValueError, match=r"blocks\.0 needs more than the first output of .*norm_attn_norm"):
        replay_of(model)


def test_experts_side_by_side_in_one_matrix_are_refused() -> None:
    with pytest.raises(ValueError, match=r"blocks\.0\.ffn\.experts\.mlp\.w1 \[64, 32\], which multiplies in parts"):
        Anatomy.of(side_by_side())


def test_blocks_that_run_twice_are_refused() -> None:
    model = tiny("llama")
    no_rotation = (torch.ones(1, 4, 8), torch.zeros(1, 4, 8))
    model.model.norm.register_forward_pre_hook(
        lambda module, args: model.model.layers[0](args[0], position_embeddings=no_rotation)
    )
    with pytest.raises(ValueError, match=r"call each block once, model\.layers\.0 was called 2 times"):
        replay_of(model)


def test_a_block_that_does_not_call_its_attention_is_one_window_without_it() -> None:
    model = tiny("llama")
    block = model.model.layers[0]
    block.forward = lambda hidden_states, **kwargs: block.mlp(hidden_states)
    replay = replay_of(model)
    assert [window.name for window in submodule_windows(replay)] == ["000", *NAMES[2:]]
    assert [name.rpartition(".")[2] for name in replay.anatomy.blocks[0].matrices] == [
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    assert len(replay.anatomy.blocks[0].left_dense()) == 4


def test_blocks_called_out_of_order_are_refused() -> None:
    model = tiny("llama")
    model.model.layers = torch.nn.ModuleList(reversed(model.model.layers))
    anatomy = Anatomy([replace(block, index=DEPTH - 1 - block.index) for block in reversed(Anatomy.of(model).blocks)])
    with pytest.raises(ValueError, match=r"model\.layers\.0 was called in place of model\.layers\.2"):
        record_calls(model, anatomy, token_ids(), [Form(None)] * DEPTH)


def test_skipped_blocks_are_refused() -> None:
    model = tiny("llama")
    anatomy = Anatomy.of(model)
    model.model.config.num_hidden_layers = 2  # transformers runs that many
    with pytest.raises(ValueError, match="call all 3 blocks, it called only the first 2"):
        record_calls(model, anatomy, token_ids(), [Form(None)] * DEPTH)


def test_forms_other_than_a_tensor_first_are_refused() -> None:
    tensor = torch.ones(1)
    assert Form.of(tensor, "a").wrap(tensor) is tensor
    assert Form.of((tensor, 1, 2), "a").wrap(tensor) == (tensor, None, None)
    assert Form.of([tensor, 1], "a").wrap(tensor) == [tensor, None]
    for output in ({"a": tensor}, (None, tensor), ()):
        with pytest.raises(ValueError, match=r"model\.layers\.0 returned (dict|tuple)"):
            Form.of(output, "model.layers.0")


def test_calls_without_hidden_states_are_refused() -> None:
    with pytest.raises(ValueError, match=r"h\.0 was called with \[4, 1, 2, 3\] and the keywords \['mask'\]"):
        Call.split("h.0", (torch.ones(4, 1, 2, 3),), {"mask": None})
    with pytest.raises(ValueError, match=r"h\.0 was called with NoneType and the keywords \['x'\]"):
        Call.split("h.0", (), {"x": torch.ones(1, 2, 3)})
