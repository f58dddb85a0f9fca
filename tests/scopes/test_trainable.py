"""Which parameters learn: by name in several families, and what full retraining then moves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from callbacks.mask_enforcer import MaskEnforcer
from recon.models.anatomy import Anatomy
from recon.scopes import FullRetraining
from recon.scopes.trainable import Parameters, chosen
from tests.support.families import DEPTH, tiny
from tests.support.scope_fixtures import IGNORED, prepared, save_tiny, trainer_of, weights_of

pytestmark = [pytest.mark.filterwarnings("error"), *(pytest.mark.filterwarnings(one) for one in IGNORED)]

# In a block, as the families' own code names them.
MATRICES = {
    "llama": [
        *("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight"),
        *("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"),
    ],
    "gpt2": ["attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"],
    "phi": [
        *("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.dense.weight"),
        *("mlp.fc1.weight", "mlp.fc2.weight"),
    ],
}
VECTORS = {
    "llama": ["input_layernorm.weight", "post_attention_layernorm.weight"],
    "gpt2": [
        *("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"),
        *("attn.c_attn.bias", "attn.c_proj.bias", "mlp.c_fc.bias", "mlp.c_proj.bias"),
    ],
    "phi": [
        *("input_layernorm.weight", "input_layernorm.bias"),
        *("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias", "self_attn.dense.bias"),
        *("mlp.fc1.bias", "mlp.fc2.bias"),
    ],
}
LAST_NORM = {
    "llama": ["model.norm.weight"],
    "gpt2": ["transformer.ln_f.weight", "transformer.ln_f.bias"],
    "phi": ["model.final_layernorm.weight", "model.final_layernorm.bias", "lm_head.bias"],
}


@pytest.mark.parametrize("family", MATRICES)
def test_weights_and_vectors_by_name(family: str) -> None:
    model = tiny(family)
    anatomy, parameters = Anatomy.of(model), dict(model.named_parameters())
    blocks = [block.name for block in anatomy.blocks]
    assert len(blocks) == DEPTH
    expected = {
        "all": list(parameters),
        "weights": [f"{block}.{name}" for block in blocks for name in MATRICES[family]],
        "vectors": [f"{block}.{name}" for block in blocks for name in VECTORS[family]] + LAST_NORM[family],
        "lora": [],
    }
    for which, names in expected.items():
        got = chosen(parameters, anatomy.blocks, which)  # type: ignore[arg-type]
        assert sorted(got) == sorted(names), which
        assert got == [name for name in parameters if name in got]  # in the order given


def test_routers_by_name() -> None:
    model = tiny("qwen3_moe")
    got = chosen(dict(model.named_parameters()), Anatomy.of(model).blocks, "routers")
    assert got == [f"model.layers.{index}.mlp.gate.weight" for index in range(DEPTH)]


def test_a_partitioned_parameter_counts_by_its_whole_shape() -> None:
    weight = nn.Parameter(torch.empty(0))  # as under ZeRO-3
    weight.ds_shape = torch.Size((4, 4))  # type: ignore[attr-defined]
    assert chosen({"a": weight, "b": nn.Parameter(torch.zeros(4))}, (), "vectors") == ["b"]


@pytest.mark.parametrize(
    ("which", "what"),
    [("vectors", "norms or biases"), ("weights", "matrices of linear maps"), ("routers", "routers of experts")],
)
def test_nothing_left_to_learn_is_refused(which: Parameters, what: str) -> None:
    weight = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ValueError, match=f"{which} needs {what} to learn, got none among the 1 parameters of window 3"):
        chosen({"embedding.weight": weight}, (), which, "window 3")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("which", "where"), [("weights", "blocks"), ("vectors", "blocks"), ("vectors", "all")])
def test_full_retraining_moves_what_was_chosen_and_nothing_else(
    family: str, which: Any, where: Any, tmp_path: Path
) -> None:
    scope = FullRetraining(name=save_tiny(family, tmp_path), epochs=1, parameters=which, train=where)
    prepared(scope)
    before = weights_of(scope.model)
    trainer_of(MaskEnforcer()).fit(scope)
    moved = {name for name, weight in weights_of(scope.model).items() if not torch.equal(weight, before[name])}
    names = (MATRICES if which == "weights" else VECTORS)[family]
    expected = {f"{block.name}.{name}" for block in Anatomy.of(scope.model).blocks for name in names}
    assert moved == expected | (set(LAST_NORM[family]) if where == "all" else set())
    assert scope.masks.violations(scope.model) == 0
    assert scope.label == f"full ({which})"


@pytest.mark.parametrize("which", ["weights", "lora"])
def test_matrices_of_the_blocks_lie_in_the_blocks(which: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{which} learns matrices in the blocks, got model\.train: all"):
        FullRetraining(name=save_tiny("llama", tmp_path), parameters=which, train="all")
