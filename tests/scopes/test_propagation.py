"""What enters a window and what it should return: dense, recovered on both ends, or recovered inputs alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from callbacks import MaskEnforcer
from recon.calibration.activations import Activations
from recon.calibration.collection import collect
from recon.models.anatomy import Anatomy
from recon.models.matrices import Matrix
from recon.models.replay import Replay
from recon.pruning.criteria import SparseGPT, Wanda
from recon.pruning.interleaved import Interleaved
from recon.pruning.masks import Masks
from recon.pruning.patterns import Unstructured
from recon.pruning.prune import prune_block
from recon.pruning.refinement import Refined, Swaps
from recon.scopes import BlockDistillation, MatrixReconstruction, SubmoduleDistillation
from recon.scopes.local.module import LocalScope
from tests.support.families import tiny
from tests.support.scope_fixtures import (
    IGNORED,
    data_of,
    prepared,
    random_masks,
    same,
    save_tiny,
    trainer_of,
    untimed,
    weights_of,
)
from tests.support.slow import slow

pytestmark = [pytest.mark.filterwarnings("error"), *(pytest.mark.filterwarnings(one) for one in IGNORED)]

CPU = torch.device("cpu")
RECOVERED = ("recovered_local", "recovered")
KINDS: dict[str, Any] = {
    "matrix": lambda **o: MatrixReconstruction(batch_size=4, **o),
    "submodule": lambda **o: SubmoduleDistillation(**{"epochs": 2, "lr": 3e-3, "batch_size": 4, **o}),
    "block": lambda **o: BlockDistillation(**{"epochs": 2, "lr": 3e-3, "batch_size": 4, **o}),
    "two blocks": lambda **o: BlockDistillation(
        **{"num_blocks": 2, "stride": 1, "epochs": 2, "lr": 3e-3, "batch_size": 4, **o}
    ),
}


class Watching:
    """Notes inputs and targets of every window as it begins."""

    def __init__(self, scope: LocalScope) -> None:
        self.seen: dict[str, dict[str, Tensor]] = {}
        begin = scope.begin

        def watching(window: Any) -> None:
            begin(window)
            self.seen[window.name] = {
                name: t.clone() for name, t in scope.calibration.batch(window, slice(None)).items()
            }

        scope.begin = watching  # type: ignore[method-assign]


def fitted(kind: str, tmp_path: Path, family: str = "llama", directory: Path | None = None, **options: Any):
    scope = KINDS[kind](name=save_tiny(family, tmp_path), **options)
    scope = prepared(scope, directory=directory)
    watching = Watching(scope)
    trainer_of(MaskEnforcer()).fit(scope)
    return scope, watching.seen


def run_blocks(model: Any, hidden: Tensor, *indices: int) -> Tensor:
    replay = Replay(model, Anatomy.of(model))
    with torch.no_grad():
        for index in indices:
            hidden = replay.run(index, hidden)
    return hidden


def embedded(scope: LocalScope, model: Any) -> Tensor:
    with torch.no_grad():
        return Replay(model, Anatomy.of(model)).embed(scope.data.tokens("train"))


@pytest.mark.parametrize("propagation", RECOVERED)
@pytest.mark.parametrize("kind", ["block", "matrix"])
def test_a_block_takes_what_the_recovered_blocks_before_it_return(kind: str, propagation: str, tmp_path: Path) -> None:
    scope, seen = fitted(kind, tmp_path, propagation=propagation)
    dense = scope.source.model()
    recovered, stream = embedded(scope, dense), embedded(scope, dense)
    for index, (_, batch) in enumerate(seen.items()):
        torch.testing.assert_close(batch["hidden"], recovered)
        stream = run_blocks(dense, stream, index)
        expected = stream if propagation == "recovered" else run_blocks(dense, recovered, index)
        torch.testing.assert_close(batch["target"], expected)
        recovered = run_blocks(scope.model, recovered, index)
    assert index == 2


@pytest.mark.parametrize("family", ["llama", "phi"])
@pytest.mark.parametrize("propagation", RECOVERED)
def test_submodules_take_what_is_recovered_before_them(propagation: str, family: str, tmp_path: Path) -> None:
    scope, seen = fitted("submodule", tmp_path, family, propagation=propagation)
    dense = scope.source.model()
    of_dense, of_recovered = (Replay(model, Anatomy.of(model)) for model in (dense, scope.model))
    recovered, stream = embedded(scope, dense), embedded(scope, dense)
    for index in range(3):
        attention, mlp = seen[f"{index:03d}.attention"], seen[f"{index:03d}.mlp"]
        with torch.no_grad():
            tapped, stream_after = of_dense.run_and_tap(index, stream)
            shift = stream - recovered if family == "llama" else 0  # phi's MLP reads what enters, too
            local = of_dense.tap(index, recovered)
            torch.testing.assert_close(attention["hidden"], recovered)
            torch.testing.assert_close(attention["target"], local if propagation != "recovered" else tapped + shift)
            now = of_recovered.tap(index, recovered)
            torch.testing.assert_close(mlp["attention"], now)
            expected = stream_after if propagation == "recovered" else of_dense.stub(index, recovered, now)
            torch.testing.assert_close(mlp["target"], expected)
            stream, recovered = stream_after, of_recovered.run(index, recovered)


@pytest.mark.parametrize("propagation", RECOVERED)
@pytest.mark.parametrize("kind", ["submodule", "block"])
def test_every_window_improves_within_its_masks(kind: str, propagation: str, tmp_path: Path) -> None:
    scope = KINDS[kind](name=save_tiny("llama", tmp_path), propagation=propagation, epochs=8)
    data = data_of()
    data._tokens["validation"] = data.tokens("train")  # ten sequences are not enough to do better on others
    trainer_of(MaskEnforcer()).fit(prepared(scope, data))
    for name, result in scope.results.items():
        assert result["after"] < result["before"], name
    scope.masks.check(scope.model)


@pytest.mark.parametrize("propagation", [*RECOVERED, slow("dense")])
@pytest.mark.parametrize("kind", ["matrix", "submodule", "block"])
def test_a_killed_run_goes_on_and_ends_bit_identically(kind: str, propagation: str, tmp_path: Path) -> None:
    if kind == "matrix" and propagation == "dense":
        pytest.skip("in test_scopes.py")
    whole, _ = fitted(kind, tmp_path, directory=tmp_path / "whole", propagation=propagation)
    broken = KINDS[kind](name=save_tiny("llama", tmp_path), propagation=propagation)
    prepared(broken, directory=tmp_path / "broken")
    finish, count = broken._finish, 0

    def killed() -> None:
        nonlocal count
        finish()
        count += 1
        if count == (1 if kind == "submodule" else 2):
            raise RuntimeError("killed")

    broken._finish = killed
    with pytest.raises(RuntimeError, match="killed"):
        trainer_of(MaskEnforcer()).fit(broken)
    again, _ = fitted(kind, tmp_path, directory=tmp_path / "broken", propagation=propagation)
    assert same(weights_of(again.model), weights_of(whole.model))
    assert untimed(again.results) == untimed(whole.results)


def test_recovered_inputs_with_dense_targets_solve_the_cross_problem(tmp_path: Path) -> None:
    """The second block's matrices, against least squares on the inputs themselves."""
    scope, _ = fitted("matrix", tmp_path, propagation="recovered")
    dense, index = scope.source.model(), 1
    name = Anatomy.of(dense).blocks[index].name + ".self_attn.q_proj"

    def inputs(model: Any, hidden: Tensor) -> Tensor:
        seen: list[Tensor] = []
        handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        run_blocks(model, hidden, index)
        handle.remove()
        return seen[-1].flatten(0, 1).double()

    start = embedded(scope, dense)
    x_dense = inputs(dense, run_blocks(dense, start, 0))
    x_recovered = inputs(dense, run_blocks(scope.model, start, 0))
    target = x_dense @ Matrix.of_module(name, dense.get_submodule(name)).weight.double().T
    keep = scope.masks[f"{name}.weight"]
    solved = scope.model.get_parameter(f"{name}.weight").double()
    for row in range(3):
        best = torch.linalg.lstsq(x_recovered[:, keep[row]], target[:, row]).solution
        torch.testing.assert_close(solved[row, keep[row]], best, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("propagation", ["dense", "recovered"])
def test_overlapping_windows_train_what_they_share_twice(propagation: str, tmp_path: Path) -> None:
    scope, seen = fitted("two blocks", tmp_path, propagation=propagation)
    assert list(scope.results) == ["000-001", "001-002"]
    dense = scope.source.model()
    start = embedded(scope, dense)
    model = scope.model if propagation == "recovered" else dense
    torch.testing.assert_close(seen["001-002"]["hidden"], run_blocks(model, start, 0))
    torch.testing.assert_close(seen["001-002"]["target"], run_blocks(dense, start, 0, 1, 2))
    assert scope.label == ("block x2 (stride 1)" if propagation == "dense" else "block x2 (stride 1, recovered)")


def test_a_shared_block_starts_where_the_first_window_left_it(tmp_path: Path) -> None:
    scope = prepared(KINDS["two blocks"](name=save_tiny("llama", tmp_path)))
    after: dict[str, dict[str, Tensor]] = {}
    begin, finish = scope.begin, scope._finish

    def beginning(window: Any) -> None:
        begin(window)
        after[f"begin {window.name}"] = weights_of(scope.model)

    def finishing() -> None:
        name = scope.window.name
        finish()
        after[f"finish {name}"] = weights_of(scope.model)

    scope.begin, scope._finish = beginning, finishing
    trainer_of(MaskEnforcer()).fit(scope)
    shared = [name for name in scope.windows[0].owned if name in scope.windows[1].owned]
    assert shared
    for name in shared:
        assert torch.equal(after["begin 001-002"][name], after["finish 000-001"][name])
        assert not torch.equal(after["finish 001-002"][name], after["finish 000-001"][name])


def test_three_blocks_at_stride_one_keep_what_enters_each(tmp_path: Path) -> None:
    model = tiny("llama", num_hidden_layers=5)
    tokens = data_of().tokens("train")
    walk = Activations(Replay(model, Anatomy.of(model)), tokens, 4, CPU, starts=(0, 1, 2))
    expected = [walk.hidden.clone()]
    for index in range(5):
        expected.append(run_blocks(model, expected[-1], index))
    for start in range(3):
        walk.enter([start, start + 1, start + 2])
        for block in Anatomy.of(model).blocks[start : start + 3]:  # what is recovered is no longer dense
            for parameter in block.module.parameters():
                parameter.data.mul_(0.5)
        torch.testing.assert_close(walk.hidden, expected[start])
        torch.testing.assert_close(walk.output, expected[start + 3])


def test_overlap_has_no_dense_window_for_recovered_inputs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="overlapping windows have no dense weights left"):
        prepared(KINDS["two blocks"](name=save_tiny("llama", tmp_path), propagation="recovered_local"))


# Interleaved pruning.


def interleaved(scope: LocalScope, criterion: Any = None, directory: Path | None = None) -> LocalScope:
    scope.load(data_of())
    anatomy = Anatomy.of(scope.model)
    chooser = Interleaved(criterion or Wanda(), [Unstructured(0.5)] * 3, anatomy.prunable(), directory)
    scope.prepare(data_of(), Masks({}), directory, interleaved=chooser)
    return scope


@pytest.mark.parametrize("criterion", [slow(Wanda()), SparseGPT()], ids=str)
@pytest.mark.parametrize("propagation", RECOVERED)
@pytest.mark.parametrize("kind", ["matrix", "submodule", "block"])
def test_masks_are_chosen_from_recovered_inputs(kind: str, propagation: str, criterion: Any, tmp_path: Path) -> None:
    scope = interleaved(KINDS[kind](name=save_tiny("llama", tmp_path), propagation=propagation), criterion)
    trainer_of(MaskEnforcer()).fit(scope)
    dense = scope.source.model()
    hidden, replay = embedded(scope, dense), Replay(dense, Anatomy.of(dense))
    for block in replay.anatomy.blocks:
        matrices = {one.weight_name: one for one in block.matrices.values()}
        with collect(matrices, criterion.needs) as statistics, torch.no_grad():
            for rows in hidden.split(4):
                replay.run(block.index, rows)
        keep, _ = prune_block(matrices, statistics, criterion, Unstructured(0.5))
        for name, chosen in keep.items():
            assert (scope.masks[name] == chosen).float().mean() > 0.99, name  # sums are rounded differently
        hidden = run_blocks(scope.model, hidden, block.index)
    assert scope.label.endswith("interleaved)")
    scope.masks.check(scope.model)


def test_refined_masks_are_chosen_along_with_recovery(tmp_path: Path) -> None:
    options = {"name": save_tiny("llama", tmp_path), "propagation": "recovered", "start": "moved"}
    scope = interleaved(KINDS["matrix"](**options), Refined(Wanda(), Swaps()))
    trainer_of(MaskEnforcer()).fit(scope)
    scope.masks.check(scope.model)
    assert all((2 * keep.sum(1) == keep.shape[1]).all() for keep in scope.masks.values())


@pytest.mark.parametrize("start", ["moved", "exact", slow("pruned")])
def test_interleaved_pruning_goes_on_with_the_masks_it_chose(start: str, tmp_path: Path) -> None:
    def scope_in(directory: Path) -> LocalScope:
        options = {"name": save_tiny("llama", tmp_path), "propagation": "recovered", "start": start}
        return interleaved(KINDS["submodule"](**options), SparseGPT(), directory)

    whole = scope_in(tmp_path / "whole")
    trainer_of(MaskEnforcer()).fit(whole)
    for stop in (1, 4):  # within a block, and between two
        broken = scope_in(tmp_path / f"broken{stop}")
        finish = broken._finish

        def killed(finish: Any = finish, scope: LocalScope = broken, stop: int = stop) -> None:
            finish()
            if len(scope.results) == stop:
                raise RuntimeError("killed")

        broken._finish = killed
        with pytest.raises(RuntimeError, match="killed"):
            trainer_of(MaskEnforcer()).fit(broken)
        again = scope_in(tmp_path / f"broken{stop}")
        trainer_of(MaskEnforcer()).fit(again)
        assert again.masks == whole.masks
        assert same(weights_of(again.model), weights_of(whole.model))


def test_interleaved_pruning_needs_recovered_inputs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pruning.inputs: recovered .* got model.propagation: dense"):
        interleaved(KINDS["submodule"](name=save_tiny("llama", tmp_path)))


def test_what_is_not_pruned_needs_no_window(tmp_path: Path) -> None:
    """Only MLPs have masks: their windows still take what the attention before them returns."""
    scope = KINDS["submodule"](name=save_tiny("llama", tmp_path), propagation="recovered")
    scope.load(data_of())
    scope.prepare(data_of(), random_masks(scope.model, exclude=("*.self_attn.*",)))
    watching = Watching(scope)
    trainer_of(MaskEnforcer()).fit(scope)
    assert list(scope.results) == ["000.mlp", "001.mlp", "002.mlp"]
    replay = Replay(scope.model, Anatomy.of(scope.model))
    hidden = run_blocks(scope.model, embedded(scope, scope.model), 0)
    with torch.no_grad():
        torch.testing.assert_close(watching.seen["001.mlp"]["attention"], replay.tap(1, hidden))
