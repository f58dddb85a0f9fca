"""An expert is solved exactly as a linear map of the same weight that sees the same rows."""

import pytest
import torch
from torch import Tensor, nn

from recon.calibration.collection import collect
from recon.models.anatomy import Anatomy
from recon.models.matrices import Matrix
from recon.models.products import Product, Products
from recon.models.replay import Replay
from recon.scopes.exact import solve
from recon.solvers import ADMMSolver, ConjugateGradients
from tests.support.families import tiny, token_ids

NAME, EXPERT = "model.layers.1.mlp.experts.down_proj", 2


@pytest.mark.parametrize("solver", [ConjugateGradients(), ADMMSolver()], ids=str)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@torch.no_grad()
def test_an_expert_is_solved_as_a_linear_map_bit_for_bit(family: str, solver: ConjugateGradients | ADMMSolver) -> None:
    model = tiny(family)
    replay = Replay(model, Anatomy.of(model))
    matrix = replay.anatomy.blocks[1].matrices[f"{NAME}.{EXPERT}"]
    rows: list[Tensor] = []

    def see(product: Product) -> None:
        if product.index == EXPERT:
            rows.append(product.inputs.clone())

    with (
        replay.expert_by_expert(),
        collect({matrix.name: matrix}, "gram") as of_expert,
        Products({NAME: matrix.parameter}, see),
    ):
        for seed in range(3):
            model(token_ids(batch=4, seq=16, seed=seed))
    out, in_ = matrix.shape
    linear = nn.Linear(in_, out, bias=False)
    linear.weight.copy_(matrix.weight)
    plain = Matrix.of_module("m", linear)
    with collect({"m": plain}, "gram") as of_linear:
        for some in rows:
            linear(some)
    assert of_expert[matrix.name].num_tokens == of_linear["m"].num_tokens > 0
    keep = torch.rand(out, in_, generator=torch.Generator().manual_seed(0)) > 0.5
    one = solve(matrix, of_expert[matrix.name], keep, solver).weight
    other = solve(plain, of_linear["m"], keep, solver).weight
    assert torch.equal(one, other)
    assert not torch.equal(one, torch.where(keep, matrix.weight, 0))
    assert not one[~keep].any()
