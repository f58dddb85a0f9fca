"""Allocations: exact totals, the formula of OWL, errors that really are equal, and what is refused."""

import copy
import json
import random

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from recon.cli import main
from recon.models.anatomy import Anatomy
from recon.pruning.allocation import OWL, Allocation, EqualErrors, spread
from recon.pruning.allocation.errors import equalized
from recon.pruning.criteria import ADMM, ALPS, RIA, Criterion, Magnitude, Random, SparseFW, SparseGPT, Wanda
from recon.pruning.masks import Masks
from recon.pruning.patterns import NM, Pattern, Unstructured
from recon.pruning.prune import Pruning, prune, prune_to
from tests.cli.test_cli import DATA, RANDOM
from tests.support.families import DEPTH, tiny, token_ids
from tests.support.references import gram
from tests.support.slow import slow

TOKENS = token_ids(batch=10, seq=24, seed=3)


class Given(Allocation):
    """The densities that a test chooses."""

    def __init__(self, densities: list[float]) -> None:
        self.chosen = densities

    def densities(self, walk, matrices, criterion, pattern):
        return dict(enumerate(self.chosen))


def uneven(family: str) -> PreTrainedModel:
    """A tiny model with blocks that differ: weights grow with depth, a few of them much more."""
    model = tiny(family)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in Anatomy.of(model).blocks:
            for matrix in block.matrices.values():
                weight = matrix.weight
                weight.mul_(1 + block.index)
                rare = torch.rand(weight.shape, generator=generator) < 0.01 * (1 + block.index)
                weight.mul_(torch.where(rare, 6.0, 1.0))
    return model


def block_densities(masks: Masks, model: PreTrainedModel) -> list[float]:
    found = []
    for block in Anatomy.of(model).blocks:
        keep = torch.cat([masks[f"{name}.weight"].flatten() for name in block.matrices])
        found.append(keep.double().mean().item())
    return found


def exact_zeros(sparsity: float, masks: Masks) -> int:
    return round(sparsity * sum(keep.numel() for keep in masks.values()))


@pytest.mark.parametrize("per", ["row", "matrix"])
@pytest.mark.parametrize("seed", range(40))
def test_any_densities_over_any_shapes_give_the_exact_total(seed: int, per: str) -> None:
    rng = random.Random(seed)
    shapes = [
        {f"{block}.{i}": (rng.randint(1, 40), rng.randint(2, 40)) for i in range(rng.randint(0, 4))}
        for block in range(4)
    ] + [{"last": (7, 13)}]
    num_weights = sum(out * in_ for members in shapes for out, in_ in members.values())
    densities = [rng.random() for _ in shapes]
    kept = sum(d * out * in_ for d, members in zip(densities, shapes, strict=True) for out, in_ in members.values())
    meant = num_weights - kept
    for num_zeros in (0, round(0.3 * num_weights), round(meant)):
        pattern = Unstructured(0.5, per)  # type: ignore[arg-type]
        patterns = spread(densities, shapes, num_zeros, pattern)
        again = spread(densities, shapes, num_zeros, pattern)
        assert patterns == again
        total = 0
        for one, members in zip(patterns, shapes, strict=True):
            scores = {name: torch.randint(4, shape).float() for name, shape in members.items()}
            for keep in one.select_all(scores).values():
                total += int((~keep).sum())
                assert bool(keep.any(1).all()) if per == "row" else bool(keep.any())
                if per == "row":
                    assert int(keep.sum(1).max() - keep.sum(1).min()) <= 1
        assert total == num_zeros


@pytest.mark.parametrize("sparsity", [0.13, 0.5, 0.6, 0.77])
def test_blocks_get_their_densities_to_within_a_row(sparsity: float) -> None:
    shapes = [{f"{block}.q": (32, 48), f"{block}.up": (96, 48), f"{block}.down": (48, 96)} for block in range(6)]
    size = sum(out * in_ for out, in_ in shapes[0].values())
    densities = [1 - sparsity + shift for shift in (0.1, -0.05, 0.02, -0.1, 0.06, -0.03)]
    num_zeros = round(sparsity * 6 * size)
    patterns = spread(densities, shapes, num_zeros, Unstructured(sparsity))
    uneven_rows = 0
    for pattern, density, members in zip(patterns, densities, shapes, strict=True):
        assert abs(pattern.density - density) <= 96 / size
        for name, (out, in_) in members.items():
            assert abs(pattern.zeros[name] / (out * in_) - 1 + density) <= 2 / in_
            uneven_rows += pattern.zeros[name] % out != 0
    assert uneven_rows <= 1
    assert patterns[-1].zeros["5.q"] % 32 == 0  # what is left over is in the very last matrix
    per_matrix = spread(densities, shapes, num_zeros, Unstructured(sparsity, "matrix"))
    for pattern, density, members in zip(per_matrix, densities, shapes, strict=True):
        assert all(abs(pattern.zeros[name] - (1 - density) * o * i) <= 2 for name, (o, i) in members.items())


def test_a_total_that_leaves_rows_empty_is_refused() -> None:
    shapes = [{"a": (5, 2), "b": (3, 1)}]
    assert spread([0.5], shapes, 5, Unstructured(0.5))[0].zeros == {"a": 5, "b": 0}
    with pytest.raises(ValueError, match=r"every row needs to keep a weight, which allows 5 zeros .* got 6"):
        spread([0.5], shapes, 6, Unstructured(0.5))


@pytest.mark.parametrize("per", ["row", "matrix"])
@pytest.mark.parametrize(
    "criterion", [Magnitude(), Random(), RIA(), SparseGPT(block=16), SparseFW(iterations=5), ADMM(), ALPS()]
)
def test_every_criterion_meets_the_total(criterion: Criterion, per: str) -> None:
    model, moved = uneven("llama"), dict[str, Tensor]()
    options = Pruning(allocation=Given([0.31, 0.47, 0.43]))
    pattern = Unstructured(0.597, per)  # type: ignore[arg-type]
    masks = prune(model, TOKENS, criterion, pattern, options, moved=moved.__setitem__)
    assert masks.num_pruned == exact_zeros(0.597, masks)
    assert block_densities(masks, model) == pytest.approx([0.31, 0.47, 0.43], abs=0.01)
    if criterion.moves_weights:
        assert all(not moved[name][~masks[name]].any() for name in masks)
        assert any(not torch.equal(moved[n][masks[n]], model.get_parameter(n)[masks[n]]) for n in masks)


@pytest.mark.parametrize("allocation", [OWL(), EqualErrors(num_sequences=3)])
@pytest.mark.parametrize("inputs", ["dense", "pruned"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_allocations_meet_the_total_leave_the_model_and_repeat(
    family: str, inputs: str, allocation: Allocation, caplog: pytest.LogCaptureFixture
) -> None:
    model = uneven(family)
    before = copy.deepcopy(model.state_dict())
    options = Pruning(inputs=inputs, allocation=allocation, batch_size=4)  # type: ignore[arg-type]
    caplog.set_level("INFO", "recon")
    masks = prune(model, TOKENS, Wanda(), Unstructured(0.63), options)
    assert masks.num_pruned == exact_zeros(0.63, masks)
    found = block_densities(masks, model)
    assert max(found) - min(found) > 0.02
    assert caplog.messages[0] == f"allocate  {allocation}  densities {' '.join(f'{density:.3f}' for density in found)}"
    assert masks == prune(model, TOKENS, Wanda(), Unstructured(0.63), options)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(module._forward_hooks == {} and module._forward_pre_hooks == {} for module in model.modules())


def test_equal_densities_of_whole_rows_are_those_without_an_allocation() -> None:
    model = uneven("llama")
    for criterion in (Wanda(), SparseGPT()):
        uniform = prune(model, TOKENS, criterion, Unstructured(0.625))
        given = prune(model, TOKENS, criterion, Unstructured(0.625), Pruning(allocation=Given([0.375] * DEPTH)))
        assert given == uniform


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("M", [2.0, 5.0])
def test_owl_follows_its_formula(family: str, M: float) -> None:
    model = uneven(family)
    shares = []
    for block in Anatomy.of(model).blocks:
        scores = []
        for matrix in block.matrices.values():
            inputs: list[Tensor] = []
            handle = matrix.module.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0]))
            with torch.no_grad():
                model(TOKENS, use_cache=False)
            handle.remove()
            weight = matrix.weight.double()
            scores.append((weight.abs() * gram(inputs[0]).diagonal().sqrt()).flatten())
        flat = torch.cat(scores)
        shares.append((flat > M * flat.mean()).double().mean().item())
    assert len(set(shares)) == DEPTH
    lambda_, sparsity = 0.1, 0.6
    term = [2 * lambda_ * (share - min(shares)) / (max(shares) - min(shares)) for share in shares]
    expected = [one - sum(term) / DEPTH + 1 - sparsity for one in term]
    masks = prune(model, TOKENS, Wanda(), Unstructured(sparsity), Pruning(allocation=OWL(lambda_, M)))
    found = block_densities(masks, model)
    assert found == pytest.approx(expected, abs=0.01)
    assert max(found) - min(found) == pytest.approx(2 * lambda_, abs=0.015)


def test_owl_weighs_blocks_by_their_weights_and_skips_those_without() -> None:
    model = uneven("llama")
    options = Pruning(["model.layers.1.*", "model.layers.0.mlp.*"], allocation=OWL())
    masks = prune(model, TOKENS, Wanda(), Unstructured(0.6), options)
    assert {name.split(".")[2] for name in masks} == {"0", "2"}
    assert masks.num_pruned == exact_zeros(0.6, masks)
    first, last = (
        torch.cat([keep.flatten() for name, keep in masks.items() if f"layers.{index}." in name]).float().mean().item()
        for index in (0, 2)
    )
    assert abs(first - last) == pytest.approx(0.16, abs=0.01)


def test_owl_on_equal_blocks_or_one_block_changes_nothing() -> None:
    model = tiny("llama", num_hidden_layers=1)
    masks = prune(model, TOKENS, Wanda(), Unstructured(0.625), Pruning(allocation=OWL()))
    assert masks == prune(model, TOKENS, Wanda(), Unstructured(0.625))


def test_owl_names_the_lambda_that_fits() -> None:
    model, pattern = uneven("llama"), Unstructured(0.95)
    with pytest.raises(ValueError, match=r"lambda_` below [\d.]+$") as error:
        prune(model, TOKENS, Wanda(), pattern, Pruning(allocation=OWL()))
    fitting = float(str(error.value).split()[-1])
    masks = prune(model, TOKENS, Wanda(), pattern, Pruning(allocation=OWL(0.97 * fitting)))
    assert masks.num_pruned == exact_zeros(0.95, masks)
    with pytest.raises(ValueError, match="densities between 0 and 1"):
        prune(model, TOKENS, Wanda(), pattern, Pruning(allocation=OWL(1.03 * fitting)))


def output_errors(model: PreTrainedModel, masks: Masks, num: int) -> list[float]:
    """Of each block by itself: whole forward passes with every other block dense, outputs seen by hooks."""

    def output(of: PreTrainedModel, index: int) -> Tensor:
        seen: list[Tensor] = []
        hook = lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)  # noqa: E731
        handle = Anatomy.of(of).blocks[index].module.register_forward_hook(hook)
        with torch.no_grad():
            of(TOKENS[:num], use_cache=False)
        handle.remove()
        return seen[0].double()

    errors = []
    for block in Anatomy.of(model).blocks:
        pruned = copy.deepcopy(model)
        masks.subset([f"{name}.weight" for name in block.matrices]).apply(pruned)
        dense = output(model, block.index)
        errors.append(float((output(pruned, block.index) - dense).square().sum() / dense.square().sum()))
    return errors


@pytest.mark.parametrize(("family", "per"), [("llama", "row"), ("llama", "matrix"), ("gpt2", "row")])
@pytest.mark.parametrize("criterion", [Wanda(), Magnitude()])
def test_errors_become_equal(criterion: Criterion, family: str, per: str) -> None:
    model, pattern = tiny(family), Unstructured(0.5, per)  # type: ignore[arg-type]
    uniform = output_errors(model, prune(model, TOKENS, criterion, pattern), num=6)
    allocation = EqualErrors(num_sequences=6, num_densities=9, max_shift=0.25)
    masks = prune(model, TOKENS, criterion, pattern, Pruning(allocation=allocation, batch_size=4))
    found, densities = output_errors(model, masks, num=6), block_densities(masks, model)
    assert masks.num_pruned == exact_zeros(0.5, masks)
    assert all(0.26 < density < 0.74 for density in densities), "no block is at a bound"
    assert max(uniform) / min(uniform) > 1.3
    assert max(found) / min(found) < 1.15
    order = sorted(range(DEPTH), key=lambda block: uniform[block])
    assert densities[order[0]] < densities[order[-1]]


def test_blocks_unlike_the_others_stay_at_their_bound() -> None:
    model = tiny("llama")
    with torch.no_grad():
        for name in Anatomy.of(model).blocks[1].matrices:
            model.get_parameter(f"{name}.weight").mul_(1e-3)  # all but the identity: no error to speak of
    allocation = EqualErrors(num_sequences=4, max_shift=0.1)
    masks = prune(model, TOKENS, Wanda(), Unstructured(0.5), Pruning(allocation=allocation))
    assert block_densities(masks, model)[1] == pytest.approx(0.4, abs=0.01)
    sparse = prune(model, TOKENS, Wanda(), Unstructured(0.9), Pruning(allocation=EqualErrors(num_sequences=4)))
    assert block_densities(sparse, model)[1] == pytest.approx(0.05, abs=0.02)  # half of what others keep on average
    dense = prune(model, TOKENS, Wanda(), Unstructured(0.0), Pruning(allocation=EqualErrors()))
    assert dense.num_pruned == 0


def test_the_common_level_is_found_on_known_curves() -> None:
    grid = np.linspace(0.2, 0.6, 5)
    curves = {0: np.exp(-5 * grid), 1: np.exp(-5 * (grid - 0.1)), 2: np.exp(-5 * (grid + 0.06))}
    errors = {block: curve.tolist() for block, curve in curves.items()}
    found = equalized(grid, errors, {0: 100, 1: 100, 2: 100}, 0.4)
    mean = (0.1 - 0.06) / 3
    assert [found[block] for block in range(3)] == pytest.approx([0.4 - mean, 0.5 - mean, 0.34 - mean], abs=1e-9)
    found = equalized(grid, errors, {0: 100, 1: 300, 2: 200}, 0.4)
    assert (found[0] + 3 * found[1] + 2 * found[2]) / 6 == pytest.approx(0.4)
    assert found[1] - found[0] == pytest.approx(0.1)


def test_flat_rising_and_zero_errors_still_meet_the_mean() -> None:
    grid = np.linspace(0.3, 0.5, 3)
    for errors in (
        {0: [0.2, 0.2, 0.2], 1: [0.2, 0.2, 0.2]},
        {0: [0.0, 0.0, 0.0], 1: [0.3, 0.2, 0.1]},
        {0: [0.1, 0.3, 0.05], 1: [0.4, 0.2, 0.2]},
    ):
        found = equalized(grid, errors, {0: 10, 1: 30}, 0.4)
        assert 0.25 * found[0] + 0.75 * found[1] == pytest.approx(0.4)
        assert all(0.3 <= density <= 0.5 for density in found.values())


def test_an_error_that_is_no_number_names_the_block() -> None:
    model = tiny("llama")
    with torch.no_grad():  # a token that is zero throughout: RMS norms and matrices leave it so
        model.get_input_embeddings().get_parameter("weight")[50] = 0
    with pytest.raises(FloatingPointError, match=r"for block 0 at a density of 0\.200"):
        prune(model, torch.full((2, 8), 50), Magnitude(), Unstructured(0.6), Pruning(allocation=EqualErrors()))


@pytest.mark.parametrize("allocation", [OWL(), EqualErrors()])
@pytest.mark.parametrize("pattern", [NM(), Unstructured(0.5, "model")])
def test_patterns_under_which_blocks_cannot_differ_are_refused(pattern: Pattern, allocation: Allocation) -> None:
    with pytest.raises(ValueError, match=rf"{allocation} gives each block .* got {pattern}; set .* to null"):
        prune(tiny("llama"), TOKENS, Magnitude(), pattern, Pruning(allocation=allocation))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OWL(lambda_=0.0), "0 < lambda_ < 0.5 and M > 0, got 0.0 and 5.0"),
        (lambda: OWL(lambda_=0.5), "got 0.5 and"),
        (lambda: OWL(M=0.0), "got 0.08 and 0.0"),
        (lambda: EqualErrors(num_sequences=0), "got 0, 5 and 0.2"),
        (lambda: EqualErrors(num_densities=1), "got 8, 1 and 0.2"),
        (lambda: EqualErrors(max_shift=1.0), "got 8, 5 and 1.0"),
    ],
)
def test_options_out_of_range_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_masks_say_their_allocation(tmp_path) -> None:
    for allocation, expected in (
        (None, "60% per row"),
        (OWL(), "60% per row, owl"),
        (EqualErrors(), "60% per row, equal errors"),
    ):
        prune_to(tmp_path / "masks", tiny("llama"), TOKENS, Wanda(), Unstructured(0.6), Pruning(allocation=allocation))
        told = Masks.read_metadata(tmp_path / "masks")
        assert (told["criterion"], told["pattern"]) == ("wanda", expected)
        assert len(Masks.load(tmp_path / "masks")) > 0  # they keep to what the file records of each matrix


@pytest.mark.parametrize("name", ["owl", slow("errors")])
def test_prune_and_fit_by_the_command_line(name: str, tmp_path) -> None:
    options = [*RANDOM, *DATA, "-c", f"allocations/{name}", "--pattern.sparsity=0.55"]
    assert main(["prune", "--run_dir", str(tmp_path / "pruned"), *options]) == 0
    masks = Masks.load(tmp_path / "pruned" / "masks.safetensors")
    assert masks.num_pruned == exact_zeros(0.55, masks)
    called = {"owl": "55% per row, owl", "errors": "55% per row, equal errors"}[name]
    assert Masks.read_metadata(tmp_path / "pruned" / "masks.safetensors")["pattern"] == called
    assert main(["fit", "-c", "scopes/matrix", "--run_dir", str(tmp_path / "run"), *options]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["pattern"] == called
    assert Masks.load(tmp_path / "run" / "masks.safetensors") == masks


def test_the_command_line_refuses_what_does_not_fit(tmp_path, capsys) -> None:
    options = ["-c", "allocations/owl", "--run_dir", str(tmp_path / "run"), *RANDOM, *DATA]
    assert main(["prune", *options, "--pattern=NM"]) == 1
    assert "or `pruning.allocation` to null" in capsys.readouterr().err
    assert main(["prune", *options, "--pruning.allocation.lambda_=0.7"]) == 2
    assert "0 < lambda_ < 0.5" in capsys.readouterr().err
