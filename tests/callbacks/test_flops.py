from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from callbacks.flops import flops_per_token
from recon.models.anatomy import Anatomy
from tests.support.families import DEPTH, DIM, FAMILIES, VOCABULARY, tiny, token_ids

SEQ = 48


def measured(model: PreTrainedModel, backward: bool = True) -> float:
    """FLOPs per token that torch counts, operator by operator."""
    ids = token_ids(batch=2, seq=SEQ)
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids, use_cache=False).logits
        if backward:
            logits.float().sum().backward()
    return counter.get_total_flops() / ids.numel()


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_that_torch_counts(family: str) -> None:
    model = tiny(family, attn_implementation="eager")  # torch has no formula for the fused attention of the CPU
    forward = flops_per_token(model, SEQ, backward=False)
    assert forward == pytest.approx(measured(model, backward=False), rel=0.01)
    assert flops_per_token(model, SEQ) == pytest.approx(measured(model), rel=0.01)
    assert flops_per_token(model, SEQ) == 3 * forward


@pytest.mark.parametrize("tied", [True, False])
def test_flops_by_hand(tied: bool) -> None:
    model = tiny("llama", tie_word_embeddings=tied)  # 4 heads of 8, 2 of them for keys and values
    weights = DEPTH * (2 * DIM * DIM + 2 * DIM * DIM // 2 + 3 * DIM * 64) + VOCABULARY * DIM
    assert flops_per_token(model, SEQ) == 6 * weights + 12 * DEPTH * 4 * 8 * SEQ


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_frozen_weight_saves_its_own_gradient(family: str) -> None:
    model = tiny(family, attn_implementation="eager")
    model.get_output_embeddings().weight.requires_grad_(False)
    for block in Anatomy.of(model).blocks[1:]:  # below them something learns, so gradients pass through
        for matrix in block.matrices.values():
            matrix.parameter.requires_grad_(False)
    assert flops_per_token(model, SEQ) == pytest.approx(measured(model), rel=0.01)
    assert flops_per_token(model, SEQ) < flops_per_token(tiny(family), SEQ)


def test_flops_of_training_the_blocks_only() -> None:
    model = tiny("llama", attn_implementation="eager").requires_grad_(False)
    for block in Anatomy.of(model).blocks:
        block.module.requires_grad_(True)
    head = model.get_output_embeddings().weight.numel()
    assert flops_per_token(model, SEQ) == pytest.approx(measured(model), rel=0.01)
    assert flops_per_token(model, SEQ) == flops_per_token(tiny("llama"), SEQ) - 2 * head


def test_a_partitioned_weight_counts_whole() -> None:
    model = tiny("gpt2")
    whole = flops_per_token(model, SEQ)
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    assert flops_per_token(model, SEQ) == whole


def test_fused_experts_count_as_often_as_they_are_chosen() -> None:
    one, two = (flops_per_token(tiny("mixtral", num_experts_per_tok=top), SEQ) for top in (1, 2))
    assert two - one == 6 * DEPTH * (2 * 64 * DIM + 64 * DIM)
    assert flops_per_token(tiny("mixtral", num_local_experts=8, num_experts_per_tok=2), SEQ) == two


def test_a_config_without_heads_is_refused() -> None:
    model = tiny("llama")
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=3))
    with pytest.raises(ValueError, match="num_attention_heads, got 3 and None in SimpleNamespace"):
        flops_per_token(model, SEQ)
