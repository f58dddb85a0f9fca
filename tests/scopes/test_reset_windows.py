"""Windows that end worse than they began: the better of start and end is kept, in every local scope."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from callbacks import MaskEnforcer
from recon.models.anatomy import Anatomy
from recon.models.windows import BlockWindow, Windows
from recon.pruning.criteria import Wanda
from recon.pruning.interleaved import Interleaved
from recon.pruning.masks import Masks
from recon.pruning.patterns import Unstructured
from recon.scopes import BlockDistillation, MatrixReconstruction, SubmoduleDistillation
from recon.scopes.local.module import LocalScope
from recon.scopes.local.window_progress import WindowProgress
from recon.solvers import ADMMSolver, GradientDescent
from tests.support.scope_fixtures import (
    IGNORED,
    data_of,
    prepared,
    same,
    save_tiny,
    trainer_of,
    untimed,
    weights_of,
)

pytestmark = [pytest.mark.filterwarnings(one) for one in IGNORED]

GROUPS = Windows([["*.q_proj", "*.k_proj", "*.v_proj"], ["*.o_proj"], ["*.mlp.*"]])
TRAINED: dict[str, Any] = {"epochs": 1, "batch_size": 4, "start": "pruned", "lr": 1.0}

KINDS: dict[str, Callable[..., LocalScope]] = {
    "submodule": lambda **o: SubmoduleDistillation(**TRAINED | o),
    "submodule, recovered": lambda **o: SubmoduleDistillation(propagation="recovered", **TRAINED | o),
    "groups": lambda **o: SubmoduleDistillation(windows=GROUPS, **TRAINED | o),
    "overlap": lambda **o: BlockDistillation(num_blocks=2, stride=1, **TRAINED | o),
    "lora": lambda **o: BlockDistillation(parameters="lora", **TRAINED | o),
    "vectors": lambda **o: BlockDistillation(parameters="vectors", **TRAINED | o),
    "on the host": lambda **o: BlockDistillation(offload="host", **TRAINED | o),
    "on disk": lambda **o: SubmoduleDistillation(offload="disk", **TRAINED | o),
    "conjugate gradients": lambda **o: MatrixReconstruction(batch_size=4, **o),
    "admm": lambda **o: MatrixReconstruction(batch_size=4, solver=ADMMSolver(), **o),
    "gradient descent": lambda **o: MatrixReconstruction(batch_size=4, solver=GradientDescent(5, lr=1.0), **o),
}
"""Learning rates far too high, and solvers that see a single sequence."""


def fit(scope: LocalScope) -> LocalScope:
    trainer_of(MaskEnforcer()).fit(scope)
    return scope


def num_sequences(kind: str) -> int:
    return 1 if kind in ("conjugate gradients", "admm") else 10


@pytest.mark.parametrize(("before", "after"), [(0.5, 0.25), (0.5, 0.5)])
def test_an_end_that_is_no_worse_is_kept(before: float, after: float) -> None:
    progress = WindowProgress(BlockWindow("000", [], [], []), before, after)
    assert not progress.is_worse
    assert progress.errors == {"before": before, "after": after}


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, "float32") for kind in KINDS), ("lora", "bfloat16"), ("on disk", "bfloat16")]
)
def test_the_start_is_restored_exactly(kind: str, dtype: str, tmp_path: Path, caplog: Any) -> None:
    name, data = save_tiny("llama", tmp_path), data_of(num=num_sequences(kind))
    scope = prepared(KINDS[kind](name=name, dtype=dtype), data, tmp_path / "run")
    pruned = weights_of(scope.source.model())
    for name, keep in scope.masks.items():
        pruned[name].masked_fill_(~keep, 0)
    with caplog.at_level(logging.WARNING, "recon"):
        fit(scope)
    ends = scope.result()[1] if kind == "on disk" else weights_of(scope.model)
    assert ends is not None
    assert same({name: ends[name] for name in pruned}, pruned)
    assert len(scope.results) == len(scope.windows) > 1
    for window in scope.windows:
        result = scope.results[window.name]
        assert result["after"] == result["before"] < result["discarded"]
        (line,) = [one for one in caplog.messages if one.startswith(f"window {window.name} ended worse")]
        assert f"{result['before']:.4g} before and {result['discarded']:.4g} after" in line
        written = load_file(scope.files.path(window))
        assert all(torch.equal(weight, pruned[name]) for name, weight in written.items())
    assert scope._start.weights == {}


def test_interleaved_pruning_returns_to_the_start_of_its_own_masks(tmp_path: Path) -> None:
    scope = SubmoduleDistillation(name=save_tiny("llama", tmp_path), propagation="recovered", **TRAINED)
    scope.load(data_of())
    dense = weights_of(scope.model)
    chooser = Interleaved(Wanda(), [Unstructured(0.5)] * 3, Anatomy.of(scope.model).prunable())
    scope.prepare(data_of(), Masks({}), interleaved=chooser)
    fit(scope)
    assert all("discarded" in result for result in scope.results.values())
    assert len(scope.masks) == 3 * 7
    for name, keep in scope.masks.items():
        dense[name].masked_fill_(~keep, 0)
    assert same(weights_of(scope.model), dense)


@pytest.mark.parametrize("stop", [1, 3])
def test_a_killed_run_keeps_its_choices_and_ends_bit_identically(stop: int, tmp_path: Path, caplog: Any) -> None:
    options = {**TRAINED, "name": save_tiny("llama", tmp_path), "propagation": "recovered", "lr": 0.05}
    whole = fit(prepared(SubmoduleDistillation(**options), directory=tmp_path / "whole"))
    reset = [name for name, result in whole.results.items() if "discarded" in result]
    assert 0 < len(reset) < len(whole.results)  # some are better, some worse
    assert reset[0] == next(iter(whole.results))
    broken = prepared(SubmoduleDistillation(**options), directory=tmp_path / "broken")
    step = broken.training_step

    def killed(batch: Any, batch_idx: int) -> Any:
        if len(broken.results) == stop and batch_idx == 1:
            raise RuntimeError("killed")
        return step(batch, batch_idx)

    broken.training_step = killed
    with pytest.raises(RuntimeError, match="killed"):
        fit(broken)
    caplog.clear()
    again = fit(prepared(SubmoduleDistillation(**options), directory=tmp_path / "broken"))
    assert same(weights_of(again.model), weights_of(whole.model))
    assert untimed(again.results) == untimed(whole.results)
    assert [name for name in whole.results if any(f"window {name} ended worse" in one for one in caplog.messages)] == (
        reset
    )


def test_a_held_out_error_that_is_no_number_still_stops_the_run(tmp_path: Path) -> None:
    scope = prepared(BlockDistillation(name=save_tiny("llama", tmp_path), **TRAINED | {"lr": 1e30}))
    with pytest.raises(FloatingPointError, match="must be finite"):
        fit(scope)
