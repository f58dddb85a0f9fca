import copy
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from recon.calibration.collection import collect
from recon.calibration.statistics import InputStatistics, Need
from recon.models.anatomy import Anatomy
from recon.models.matrices import Matrix
from recon.pruning.criteria import Criterion, Magnitude, Random, SparseGPT, Wanda
from recon.pruning.masks import Masks
from recon.pruning.patterns import NM, Counted, Pattern, Unstructured
from recon.pruning.prune import Pruning, matrices_by_block, prune, prune_block
from tests.support.families import DEPTH, tiny, token_ids
from tests.support.references import gram, keep_highest, keep_per_group, keep_per_row

pytestmark = pytest.mark.filterwarnings("error")

TOKENS = token_ids(batch=10, seq=24, seed=3)


class Recorder(Criterion):
    """Magnitude that notes the statistics it is given."""

    needs: ClassVar[Need] = "gram"

    def __init__(self) -> None:
        self.seen: dict[str, InputStatistics] = {}

    def scores(self, weight: Tensor, statistics: InputStatistics | None, name: str) -> Tensor:
        assert statistics is not None
        self.seen[name] = statistics
        return weight.float().abs()


class Halver(Recorder):
    """Magnitude that halves what it keeps, and leaves it to others to zero the rest."""

    moves_weights: ClassVar[bool] = True

    def prune(
        self, weight: Tensor, statistics: InputStatistics | None, pattern: Pattern, name: str
    ) -> tuple[Tensor, Tensor]:
        _, keep = super().prune(weight, statistics, pattern, name)
        return weight.double() / 2, keep


def inputs_of(model: PreTrainedModel, names: list[str]) -> dict[str, Tensor]:
    """What enters the matrices `names` in one forward pass of the whole model."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda module, args, name=name: seen.__setitem__(name, args[0].detach().clone())
        )
        for name in names
    ]
    with torch.no_grad():
        model(TOKENS, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def slow_prune(model: PreTrainedModel, wanda: bool, pruned_inputs: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Grams and 50 %-per-row masks by whole forward passes of a copy that is pruned block by block."""
    model = copy.deepcopy(model)
    grams, masks = {}, {}
    for block in Anatomy.of(model).blocks:
        names = [f"{name}.weight" for name in block.matrices]
        inputs = inputs_of(model, names)
        for name, module in zip(names, block.matrices.values(), strict=True):
            weight = module.out_in(model.get_parameter(name).detach()).double()
            grams[name] = gram(inputs[name])
            scores = weight.abs() * (grams[name].diagonal().sqrt() if wanda else 1)
            masks[name] = module.out_in(keep_per_row(scores, scores.shape[1] // 2))
        if pruned_inputs:
            with torch.no_grad():
                for name in names:
                    model.get_parameter(name).masked_fill_(~masks[name], 0)
    return grams, masks


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_statistics_and_masks_are_those_of_whole_forward_passes(family: str, inputs: str) -> None:
    model, recorder = tiny(family), Recorder()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = Pruning(inputs=inputs, batch_size=4)  # type: ignore[arg-type]
    masks = prune(model, TOKENS, recorder, Unstructured(0.5), options)
    grams, expected = slow_prune(model, wanda=False, pruned_inputs=inputs == "pruned")
    assert list(recorder.seen) == list(grams) == list(masks)
    for name, statistics in recorder.seen.items():
        assert statistics.num_tokens == TOKENS.numel()
        assert statistics.gram is not None
        torch.testing.assert_close(statistics.gram.double(), grams[name], rtol=1e-3, atol=1e-4)
        assert torch.equal(masks[name], expected[name])
    wanda = prune(model, TOKENS, Wanda(), Unstructured(0.5), options)
    _, expected = slow_prune(model, wanda=True, pruned_inputs=inputs == "pruned")
    differing = sum(int((wanda[name] != expected[name]).sum()) for name in expected)
    assert differing <= 4  # two near-ties that fp32 may order otherwise
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(module._forward_hooks == {} for module in model.modules())


def test_pruned_inputs_make_a_difference_only_after_the_first_block() -> None:
    model = tiny("llama")
    dense, pruned = (
        prune(model, TOKENS, Wanda(), Unstructured(0.5), Pruning(inputs=inputs))  # type: ignore[arg-type]
        for inputs in ("dense", "pruned")
    )
    same = {name: torch.equal(dense[name], pruned[name]) for name in dense}
    assert all(same[name] == ("layers.0." in name) for name in same)


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_moved_weights_are_handed_on_and_pass_the_activations_on(family: str, inputs: str) -> None:
    model, criterion, moved = tiny(family), Halver(), dict[str, Tensor]()
    before = copy.deepcopy(model.state_dict())
    options = Pruning(inputs=inputs, batch_size=4)  # type: ignore[arg-type]
    masks = prune(model, TOKENS, criterion, Unstructured(0.5), options, moved=moved.__setitem__)
    assert masks == prune(model, TOKENS, Magnitude(), Unstructured(0.5), options)
    walked = copy.deepcopy(model)
    for block in Anatomy.of(walked).blocks:
        names = [f"{name}.weight" for name in block.matrices]
        for name, seen in inputs_of(walked, names).items():
            found = criterion.seen[name].gram
            assert found is not None
            torch.testing.assert_close(found.double(), gram(seen), rtol=1e-3, atol=1e-4)
            weight = walked.get_parameter(name).detach()
            expected = torch.where(masks[name], weight / 2, 0)
            assert torch.equal(moved[name], expected)
            assert moved[name].dtype == weight.dtype
            if inputs == "pruned":
                weight.copy_(expected)
    assert moved.keys() == masks.keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_batch_size_does_not_matter(batch_size: int) -> None:
    model = tiny("llama")
    expected = {criterion: prune(model, TOKENS, criterion(), Unstructured(0.5)) for criterion in (Magnitude, Wanda)}
    options = Pruning(batch_size=batch_size)
    assert prune(model, TOKENS, Magnitude(), Unstructured(0.5), options) == expected[Magnitude]
    found = prune(model, TOKENS, Wanda(), Unstructured(0.5), options)
    assert sum(int((found[name] != expected[Wanda][name]).sum()) for name in found) <= 2


@pytest.mark.parametrize("criterion", [Magnitude(), Wanda()])
def test_weights_of_the_whole_model_compete_for_an_exact_count(criterion: Criterion) -> None:
    model = tiny("llama")
    masks = prune(model, TOKENS, criterion, Unstructured(0.35, per="model"))
    total = sum(keep.numel() for keep in masks.values())
    assert masks.num_pruned == round(0.35 * total)
    assert len({round(1 - keep.float().mean().item(), 3) for keep in masks.values()}) > 3  # unlike each other
    if isinstance(criterion, Magnitude):
        scores = torch.cat([model.get_parameter(name).detach().abs().flatten() for name in masks])
        kept = keep_highest(scores.tolist(), total - masks.num_pruned)
        assert torch.cat([keep.flatten() for keep in masks.values()]).tolist() == kept


def test_competing_across_the_model_excludes_pruned_inputs() -> None:
    with pytest.raises(ValueError, match=r"pruning\.inputs: pruned needs masks block by block"):
        prune(tiny("llama"), TOKENS, Magnitude(), Unstructured(0.5, per="model"), Pruning(inputs="pruned"))


@pytest.mark.parametrize(("inputs", "per"), [("dense", "row"), ("dense", "model"), ("pruned", "row")])
def test_excluded_matrices_have_no_mask(inputs: str, per: str) -> None:
    options = Pruning(["*.down_proj", "model.layers.1.*"], inputs)  # type: ignore[arg-type]
    masks = prune(tiny("llama"), TOKENS, Wanda(), Unstructured(0.5, per=per), options)  # type: ignore[arg-type]
    assert len(masks) == 6 * (DEPTH - 1)
    assert not any("down_proj" in name or "layers.1" in name for name in masks)
    assert masks.num_pruned == sum(keep.numel() for keep in masks.values()) // 2


def test_an_exclusion_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'\*\.fc9' matches none of"):
        prune(tiny("llama"), TOKENS, Magnitude(), Unstructured(0.5), Pruning(["*.fc9"]))


def test_two_of_four_along_the_inputs_of_either_layout() -> None:
    for family in ("llama", "gpt2"):
        model = tiny(family)
        masks = prune(model, TOKENS, Magnitude(), NM(2, 4))
        for name, module in Anatomy.of(model).prunable().items():
            weight = module.out_in(model.get_parameter(name).detach())
            assert torch.equal(module.out_in(masks[name]), keep_per_group(weight.abs(), 2, 4))


def test_two_of_four_names_the_matrix_whose_width_it_does_not_divide() -> None:
    model = tiny("llama", intermediate_size=66)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.down_proj"):
        prune(model, TOKENS, Magnitude(), NM(2, 4))
    masks = prune(model, TOKENS, Magnitude(), NM(2, 4), Pruning(["*.down_proj"]))
    assert masks.sparsity == 0.5


def test_masks_follow_the_seed_of_the_criterion_only() -> None:
    model = tiny("gpt2")
    first = prune(model, TOKENS, Random(seed=1), Unstructured(0.5))
    assert prune(model, token_ids(3, 5, seed=9), Random(seed=1), Unstructured(0.5)) == first
    assert prune(model, TOKENS, Random(seed=2), Unstructured(0.5)) != first


def test_every_block_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "recon")
    prune(tiny("llama"), TOKENS, Wanda(), NM(2, 4))
    assert [line.split("  ")[:3] for line in caplog.messages] == [
        ["prune", f"block {index + 1}/{DEPTH}", "7 matrices"] for index in range(DEPTH)
    ]


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_what_is_no_number_stops_pruning_and_leaves_the_model(inputs: str) -> None:
    model = tiny("gpt2")
    tokens = TOKENS.masked_fill(TOKENS == 95, 94)
    tokens[5, 3] = 95
    with torch.no_grad():
        model.get_parameter("transformer.wte.weight")[95] = 3e38  # LayerNorm squares it
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(FloatingPointError, match="after block 0 in the batch that begins with sequence 4"):
        prune(model, tokens, Magnitude(), Unstructured(0.5), Pruning(inputs=inputs, batch_size=4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`transformer\.h\.0\.attn\.c_attn\.weight` in batch 1"):
        prune(model, tokens, Wanda(), Unstructured(0.5), Pruning(inputs=inputs, batch_size=4))  # type: ignore[arg-type]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_failure_among_pruned_blocks_restores_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apply = Masks.apply

    def apply_and_fail(masks: Masks, model: PreTrainedModel) -> None:
        apply(masks, model)
        raise KeyboardInterrupt

    monkeypatch.setattr(Masks, "apply", apply_and_fail)
    with pytest.raises(KeyboardInterrupt):
        prune(model, TOKENS, Magnitude(), Unstructured(0.5), Pruning(inputs="pruned"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_masks_own_their_memory_in_the_parameters_layout() -> None:
    model = tiny("gpt2")
    for name, keep in prune(model, TOKENS, Magnitude(), Unstructured(0.5)).items():
        assert keep.shape == model.get_parameter(name).shape
        assert keep.is_contiguous()
        assert keep.device.type == "cpu"


def statistics_of(model: PreTrainedModel, matrices: dict[str, Matrix]) -> dict[str, InputStatistics]:
    with collect(matrices, need="gram") as statistics, torch.no_grad():
        model(TOKENS, use_cache=False)
    return statistics


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_block_is_pruned_in_the_parameters_layout_and_dtype(family: str) -> None:
    model = tiny(family).bfloat16()
    matrices = matrices_by_block(Anatomy.of(model))[1]
    before = copy.deepcopy(model.state_dict())
    statistics = statistics_of(model, matrices)
    keep, moved = prune_block(matrices, statistics, Halver(), Unstructured(0.5))
    assert list(keep) == list(moved) == list(matrices)
    for name in matrices:
        weight = model.get_parameter(name).detach()
        assert moved[name].dtype == torch.bfloat16
        assert torch.equal(moved[name], torch.where(keep[name], weight / 2, 0))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    unmoved = prune_block(matrices, statistics, Magnitude(), Unstructured(0.5))
    assert unmoved[1] == {}
    assert all(torch.equal(unmoved[0][name], keep[name]) for name in keep)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_with_one_zero_more_are_pruned_under_their_own_count(family: str) -> None:
    model, criterion = tiny(family), SparseGPT()
    matrices = matrices_by_block(Anatomy.of(model))[0]
    name, module = next(iter(matrices.items()))
    statistics = statistics_of(model, {name: module})
    weight = module.out_in(model.get_parameter(name).detach())
    out, in_ = weight.shape
    pattern = Counted({name: 16 * out + 5}, weight.numel())
    keep, moved = prune_block({name: module}, statistics, criterion, pattern)
    fewer, more = (criterion.prune(weight, statistics[name], Unstructured(n / in_), name) for n in (16, 17))
    assert (~module.out_in(keep[name])).sum(1).tolist() == [17] * 5 + [16] * (out - 5)
    for row in range(out):
        after, chosen = more if row < 5 else fewer
        assert torch.equal(module.out_in(keep[name])[row], chosen[row])
        assert torch.equal(module.out_in(moved[name])[row], after[row])


def test_masks_chosen_with_recovery_are_refused_here() -> None:
    with pytest.raises(ValueError, match=r"pruning\.inputs: recovered .* model\.propagation recovered or"):
        prune(tiny("llama"), TOKENS, Magnitude(), Unstructured(0.5), Pruning(inputs="recovered"))


def test_matrices_by_block_leave_out_what_is_excluded() -> None:
    anatomy = Anatomy.of(tiny("llama"))
    assert [len(matrices) for matrices in matrices_by_block(anatomy, ["model.layers.1.*", "*.up_proj"])] == [6, 0, 6]
    assert [name for matrices in matrices_by_block(anatomy) for name in matrices] == list(anatomy.prunable())
