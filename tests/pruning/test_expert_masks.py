"""Masks of stacks: one a parameter, each slice under its own pattern, along its own inputs."""

from pathlib import Path

import pytest
import torch
from torch import nn

from recon.models.anatomy import Anatomy
from recon.models.matrices import Matrix
from recon.pruning.criteria import Magnitude, SparseGPT, Wanda
from recon.pruning.masks import Masks
from recon.pruning.options import Pruning
from recon.pruning.patterns import NM, Unstructured
from recon.pruning.prune import prune, prune_to
from recon.pruning.refinement import Refined, Swaps
from tests.support.families import tiny, token_ids
from tests.support.references import keep_per_group

TOKENS = token_ids(batch=6, seq=16, seed=4)
STACK = "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_groups_lie_along_the_inputs_of_each_slice(family: str) -> None:
    model = tiny(family)
    masks = prune(model, TOKENS, Magnitude(), NM(2, 4))
    for matrix in Anatomy.of(model).prunable().values():
        found = masks.of(matrix, torch.device("cpu"))
        assert torch.equal(found, matrix.part_of(masks[matrix.parameter_name]))
        assert torch.equal(found, keep_per_group(matrix.weight.abs(), 2, 4))
        assert masks.num_pruned_of(matrix) == int((~found).sum())


def test_moved_weights_and_refined_masks_of_all_slices(tmp_path: Path) -> None:
    model, moved = tiny("gpt_oss"), {}
    masks = prune(model, TOKENS, SparseGPT(), NM(2, 4), moved=moved.__setitem__)
    assert moved.keys() == masks.keys()
    assert all(not moved[name][~keep].any() for name, keep in masks.items())
    pattern = Unstructured(0.5, "model")
    file = tmp_path / "masks.safetensors"
    masks = prune_to(file, model, TOKENS, Refined(Wanda(), Swaps()), pattern, None, tmp_path / "moved")
    assert Masks.load(file) == masks
    assert masks.sparsity == 0.5


def test_one_slice_may_stay_dense(tmp_path: Path) -> None:
    model, file = tiny("mixtral"), tmp_path / "masks.safetensors"
    options = Pruning(exclude=["*.down_proj.2"])
    masks = prune_to(file, model, TOKENS, Wanda(), Unstructured(0.5), options)
    assert masks[STACK][2].all()
    assert not masks[STACK][[0, 1, 3]].all()
    assert Masks.load(file) == masks
    for index, message in ((2, rf"`{STACK}\.2`, not all"), (1, rf"`{STACK}\.1`, not 32")):
        broken = dict(masks)
        broken[STACK][index, 0, :40] = False
        Masks(broken).save(file, Masks.read_metadata(file))
        with pytest.raises(ValueError, match=message):
            Masks.load(file)


@pytest.mark.parametrize("shape", [(3, 4, 6), (3, 3, 5), (2, 1, 1)])
def test_the_mask_of_a_slice_is_cut_out_of_the_bits(shape: tuple[int, ...]) -> None:
    module = nn.Module()
    module.w = nn.Parameter(torch.empty(shape))
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    masks = Masks({"w": keep})
    for index, matrix in enumerate(Matrix.slices("w", module, is_transposed=True)):
        assert torch.equal(masks.of(matrix, torch.device("cpu")), keep[index].T)
        assert masks.num_pruned_of(matrix) == int((~keep[index]).sum())
