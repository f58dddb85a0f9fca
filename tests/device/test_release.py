"""Memory after the fit: a written model is let go of, by whatever held a part of it."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from recon.experiment import recovery
from recon.experiment.job import Job
from recon.experiment.options import RunOptions
from recon.pruning.criteria import Wanda
from recon.pruning.patterns import Unstructured
from recon.pruning.prune import Pruning
from recon.scopes import BlockDistillation, FullRetraining, MatrixReconstruction, Scope, SubmoduleDistillation
from tests.support.scope_fixtures import IGNORED, save_tiny
from tests.support.simulated.runs import run
from tests.support.simulated.tags import CPU
from tests.support.slow import quick

pytestmark = [pytest.mark.filterwarnings("error"), *(pytest.mark.filterwarnings(one) for one in IGNORED)]

QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 4}
INTERLEAVED = Pruning(inputs="recovered", batch_size=4)
CASES: dict[str, tuple[Callable[..., Scope], Pruning]] = {
    "matrix": (lambda name: MatrixReconstruction(name=name, batch_size=4), Pruning()),
    "submodule": (lambda name: SubmoduleDistillation(name=name, propagation="recovered", **QUICK), INTERLEAVED),
    "offloaded": (lambda name: BlockDistillation(name=name, offload="host", parameters="lora", **QUICK), Pruning()),
    "full": (lambda name: FullRetraining(name=name, epochs=1, loss="distillation"), Pruning()),
}


@pytest.mark.parametrize("case", quick(CASES, "submodule", "offloaded"))
def test_no_weight_of_a_written_model_is_left(case: str, tmp_path: Path) -> None:
    left: list[str] = []
    write = recovery.write

    def watched(job: Job) -> None:
        weights = {name: weakref.ref(one) for name, one in job.scope.model.named_parameters()}
        write(job)
        gc.collect()
        left.extend(name for name, one in weights.items() if one() is not None)
        left.append("looked")

    make, pruning = CASES[case]
    options = RunOptions(Wanda(), Unstructured(0.5), pruning, baselines=False, drift=False)
    with mock.patch.object(recovery, "write", watched):
        run(make(save_tiny("llama", tmp_path, num_hidden_layers=2)), tmp_path / "run", CPU, options)
    assert left == ["looked"]
