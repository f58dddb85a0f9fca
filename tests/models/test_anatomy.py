import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, BartConfig, BartForCausalLM
from transformers.pytorch_utils import Conv1D

from recon.models.anatomy import Anatomy
from recon.models.matrices import is_matrix
from tests.support.families import DEPTH, FAMILIES, tiny

# Family -> block list, attention submodule, matrices a block: read off the transformers sources by hand.
LAYOUTS = {
    "llama": ("model.layers", "self_attn", 7),
    "mistral": ("model.layers", "self_attn", 7),
    "qwen2": ("model.layers", "self_attn", 7),
    "qwen3": ("model.layers", "self_attn", 7),
    "gemma2": ("model.layers", "self_attn", 7),
    "gemma3_text": ("model.layers", "self_attn", 7),
    "olmo2": ("model.layers", "self_attn", 7),
    "stablelm": ("model.layers", "self_attn", 7),
    "cohere": ("model.layers", "self_attn", 7),
    "phi": ("model.layers", "self_attn", 6),
    "phi3": ("model.layers", "self_attn", 4),
    "gpt_neox": ("gpt_neox.layers", "attention", 4),
    "opt": ("model.decoder.layers", "self_attn", 6),
    "gpt2": ("transformer.h", "attn", 4),
    "gptj": ("transformer.h", "attn", 6),
    "gpt_neo": ("transformer.h", "attn", 6),
    "falcon": ("transformer.h", "self_attention", 4),
    "bloom": ("transformer.h", "self_attention", 4),
    "mpt": ("transformer.blocks", "attn", 4),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_layout_of_every_family(family: str) -> None:
    model = tiny(family)
    block_list, attention, num_matrices = LAYOUTS[family]
    blocks = Anatomy.of(model).blocks
    assert [block.index for block in blocks] == list(range(DEPTH))
    for block in blocks:
        assert block.name == f"{block_list}.{block.index}"
        assert block.mixer_name == f"{block.name}.{attention}"
        assert model.get_submodule(block.name) is block.module
        assert model.get_submodule(block.mixer_name) is block.mixer
        assert len(block.matrices) == num_matrices


@pytest.mark.parametrize("family", FAMILIES)
def test_prunable_is_every_matrix_of_the_blocks_and_nothing_else(family: str) -> None:
    model = tiny(family)
    parameters = dict(model.named_parameters())
    anatomy = Anatomy.of(model)
    prunable = anatomy.prunable()
    for name, matrix in prunable.items():
        assert matrix.parameter is parameters[name]
    inside = {id(m) for block in anatomy.blocks for m in block.module.modules() if is_matrix(m)}
    assert {id(matrix.module) for matrix in prunable.values()} == inside
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    assert not ends & inside


def test_matrices_are_listed_in_module_order() -> None:
    projections = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    projections += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    expected = [f"model.layers.{i}.{name}.weight" for i in range(DEPTH) for name in projections]
    assert list(Anatomy.of(tiny("llama")).prunable()) == expected


def test_conv1d_counts_as_a_matrix() -> None:
    assert all(isinstance(matrix.module, Conv1D) for matrix in Anatomy.of(tiny("gpt2")).prunable().values())


def test_block_parameters_carry_their_full_names() -> None:
    model = tiny("gpt_neox")
    parameters = dict(model.named_parameters())
    for block in Anatomy.of(model).blocks:
        expected = {n: p for n, p in parameters.items() if n.startswith(block.name + ".")}
        assert block.parameters().keys() == expected.keys()
        assert all(parameter is expected[name] for name, parameter in block.parameters().items())


def test_exclude_patterns_match_module_names() -> None:
    anatomy = Anatomy.of(tiny("llama"))
    kept = anatomy.prunable(exclude=["*.down_proj", "model.layers.0.*"])
    assert len(kept) == 2 * 6
    assert not any("down_proj" in name or ".0." in name for name in kept)


def test_an_exclude_pattern_without_match_is_refused() -> None:
    message = r"'lm_head' matches none of model\.layers\.0\.self_attn\.q_proj, .* and 13 more\. .*never pruned"
    with pytest.raises(ValueError, match=message):
        Anatomy.of(tiny("llama")).prunable(exclude=["*.q_proj", "lm_head"])


def test_excluding_everything_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\['\*'\], which matches all 21"):
        Anatomy.of(tiny("llama")).prunable(exclude=["*"])


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoders_are_refused(family: str) -> None:
    config = AutoConfig.for_model(family, vocab_size=96, d_model=32, decoder_start_token_id=0, pad_token_id=0)
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(ValueError, match=rf"decoder-only model.*got {type(model).__name__}, an encoder-decod"):
        Anatomy.of(model)


def test_cross_attention_that_is_not_called_is_left_dense() -> None:
    config = BartConfig(vocab_size=96, d_model=32, encoder_layers=2, decoder_layers=3)
    block = Anatomy.of(BartForCausalLM(config)).blocks[0]
    assert block.mixer_name == "model.decoder.layers.0.self_attn"
    called = [f"self_attn.{name}_proj" for name in ("k", "v", "q", "out")] + ["fc1", "fc2"]
    assert list(block.matrices) == [f"model.decoder.layers.0.{name}" for name in called]
    uncalled = [f"encoder_attn.{name}_proj.weight" for name in ("k", "v", "q", "out")]
    assert block.left_dense() == {name: [32, 32] for name in uncalled}


def test_no_block_list_is_refused_with_the_lists_found() -> None:
    model = tiny("llama")
    model.config.num_hidden_layers = 5
    assert Anatomy.of(model).blocks[2].name == "model.layers.2"  # the only list
    model.model.others = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    message = r"num_hidden_layers \(5\), .*found model\.layers \(3\), model\.others \(2\) in LlamaFor"
    with pytest.raises(ValueError, match=message):
        Anatomy.of(model)


def test_shared_blocks_are_refused() -> None:
    model = tiny("llama")
    model.model.layers[2].mlp = model.model.layers[0].mlp
    message = r"model\.layers\.2\.mlp\.gate_proj\.weight is model\.layers\.0\.mlp\.gate_proj\.weight"
    with pytest.raises(ValueError, match=message):
        Anatomy.of(model)


def test_quantised_weights_are_refused() -> None:
    model = tiny("llama")
    quantised = nn.Parameter(torch.zeros(64, 32, dtype=torch.int8), requires_grad=False)
    model.model.layers[0].mlp.up_proj.weight = quantised
    with pytest.raises(ValueError, match=r"got torch\.int8 for model\.layers\.0\.mlp\.up_proj\.weight"):
        Anatomy.of(model)


def test_blocks_without_matrices_are_refused() -> None:
    model = tiny("gpt2")
    for block in model.transformer.h:
        block.forward = lambda hidden_states, *args, **kwargs: hidden_states
    with pytest.raises(ValueError, match=r"found none that is called in transformer\.h\.0, which holds .*GPT2Block"):
        Anatomy.of(model)


def test_the_shortest_name_wins_among_lists_of_the_same_length() -> None:
    model = tiny("llama")
    model.model.auxiliary_heads = nn.ModuleList(nn.Linear(4, 4) for _ in range(DEPTH))
    assert Anatomy.of(model).blocks[0].name == "model.layers.0"
