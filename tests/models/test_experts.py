"""Fused experts are found by how they are multiplied: stacks, their layout, routers, and what is none of these."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedModel

from recon.models.anatomy import Anatomy
from recon.models.matrices import Matrix, joined
from recon.models.products import Product, Products
from tests.support.families import DIM, MIXTURES, tiny, token_ids
from tests.support.slow import quick

# Family -> the module with stacks in its last block, their names, whether they are stored in x out, rows a token, and
# the router where it is a linear map: read off the transformers sources by hand.
LAYOUTS = {
    "mixtral": ("mlp.experts", ("gate_up_proj", "down_proj"), False, 2, None),
    "gpt_oss": ("mlp.experts", ("gate_up_proj", "down_proj"), True, 2, None),
    "llama4_text": ("feed_forward.experts", ("gate_up_proj", "down_proj"), True, 4, "feed_forward.router"),
    "hunyuan_v1_moe": ("mlp.experts", ("gate_up_proj", "down_proj"), False, 2, "mlp.gate.wg"),
    "phimoe": ("mlp.experts", ("gate_up_proj", "down_proj"), False, 2, "mlp.router"),
    "afmoe": ("mlp.experts", ("gate_up_proj", "down_proj"), False, 2, "mlp.router.gate"),
    "deepseek_v2": ("mlp.experts", ("gate_up_proj", "down_proj"), False, 2, None),
}


@pytest.mark.parametrize("family", quick(LAYOUTS, "gpt_oss", "llama4_text"))
def test_stacks_routers_and_layouts(family: str) -> None:
    model = tiny(family)
    owner, stacks, is_transposed, rows, router = LAYOUTS[family]
    anatomy = Anatomy.of(model)
    block = anatomy.blocks[-1]
    for stack in stacks:
        name = f"{block.name}.{owner}.{stack}"
        found = [one for one in block.matrices.values() if one.parameter_name == name]
        parameter = model.get_parameter(name)
        assert [one.name for one in found] == [f"{name}.{index}" for index in range(len(parameter))]
        for index, matrix in enumerate(found):
            assert matrix.parameter is parameter
            assert matrix.weight_name == matrix.name
            assert matrix.is_transposed == is_transposed
            expected = parameter[index].T if is_transposed else parameter[index]
            assert torch.equal(matrix.weight, expected)
            assert matrix.shape == expected.shape
            assert matrix.rows_per_token == rows / len(parameter)
    left = anatomy.left_dense()
    matrices = {one.parameter_name for one in block.matrices.values()}
    assert not left.keys() & matrices
    routers = {n: model.get_parameter(n) for n in block.routers}
    assert routers
    assert not routers.keys() & matrices
    assert all(len(parameter) in one.shape for one in routers.values())
    everything = {n for n, one in block.parameters().items() if one.ndim > 1}
    assert everything <= left.keys() | matrices
    if router is not None:
        assert f"{block.name}.{router}.weight" in left
        assert isinstance(model.get_submodule(f"{block.name}.{router}"), nn.Linear)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_slice_multiplies_as_the_model_does(family: str) -> None:
    """Overwriting one slice through its view changes the model as overwriting the parameter does."""
    model = tiny(family)
    other = copy.deepcopy(model)
    matrix = Anatomy.of(model).blocks[1].matrices["model.layers.1.mlp.experts.down_proj.2"]
    matrix.weight.mul_(2)
    with torch.no_grad():
        other.get_parameter(matrix.parameter_name)[2] *= 2
    with torch.no_grad():
        assert torch.equal(model(token_ids()).logits, other(token_ids()).logits)


def test_exclusions_name_slices_or_whole_stacks() -> None:
    anatomy = Anatomy.of(tiny("mixtral"))
    everything = anatomy.prunable()
    assert len(everything) == 3 * (4 + 8)
    stacks = anatomy.prunable(exclude=["*.experts.gate_up_proj"])
    assert everything.keys() - stacks.keys() == {n for n in everything if ".gate_up_proj." in n}
    slices = anatomy.prunable(exclude=["*.experts.*_proj.3"])
    assert everything.keys() - slices.keys() == {n for n in everything if n.endswith(".3")}
    with pytest.raises(ValueError, match=r"'\*\.gate' matches none of .*routers and the head are never pruned"):
        anatomy.prunable(exclude=["*.gate"])


class Convolved(LlamaForCausalLM):
    """A model with the kernel of a depthwise convolution in each block."""

    def __init__(self, config: object) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.conv = nn.Conv1d(DIM, DIM, 3, groups=DIM, padding=2, bias=False)
            layer.mlp.register_forward_pre_hook(_convolve)


def _convolve(mlp: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
    (x,) = args
    return (x + mlp.conv(x.mT)[..., : x.shape[1]].mT,)


def convolved() -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Convolved(tiny("llama").config).eval()


def test_kernels_of_convolutions_are_no_matrices_and_left_dense() -> None:
    model = convolved()
    anatomy = Anatomy.of(model)
    assert len(anatomy.prunable()) == len(Anatomy.of(tiny("llama")).prunable())
    assert anatomy.left_dense() == {f"model.layers.{i}.mlp.conv.weight": [DIM, 1, 3] for i in range(3)}


def test_parameters_of_three_dimensions_that_multiply_with_nothing_are_left_dense() -> None:
    model = tiny("llama")
    model.model.layers[0].mlp.kernel = nn.Parameter(torch.zeros(4, 2, 2))
    assert Anatomy.of(model).left_dense() == {"model.layers.0.mlp.kernel": [4, 2, 2]}


def test_products_are_told_by_storage_not_by_shape() -> None:
    square = torch.randn(3, 4, 4)
    seen: list[Product] = []
    with Products({"w": square}, seen.append):
        x = torch.randn(5, 4)
        F.linear(x, square[1])
        _ = x @ square[2]
        torch.addmm(torch.zeros(4), x, square[0].T)
        torch.bmm(x.expand(2, 5, 4), square[1:])
        F.linear(x, square[1].clone())
        F.linear(x, square[1, :2])
        _ = square[0] @ x.T
    found = [(one.index, one.is_transposed, one.is_batched) for one in seen]
    single = [(1, False, False), (2, True, False), (0, False, False)]
    assert found == [*single, (1, True, True), (2, True, True), (0, False, False)]
    assert all(torch.equal(one.inputs, x) for one in seen)


def test_parts_are_joined_in_the_parameters_layout() -> None:
    module = nn.Module()
    module.w = nn.Parameter(torch.randn(3, 4, 6))
    matrices = {one.weight_name: one for one in Matrix.slices("m.w", module, is_transposed=True)}
    part = torch.randn(6, 4)
    (found,) = joined(matrices, {"m.w.1": part}, torch.zeros_like).values()
    assert torch.equal(found[1], part.T)
    assert not found[[0, 2]].any()


def test_every_mixture_is_listed_once() -> None:
    assert len(MIXTURES) >= 12
