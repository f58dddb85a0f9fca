"""The promise of the local scopes: what the device holds does not depend on how deep the model is."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from callbacks import MaskEnforcer, MemoryProfiler
from recon.profiling.phases import Phases
from recon.pruning.criteria import Wanda
from recon.pruning.patterns import Unstructured
from recon.pruning.prune import prune_to
from recon.report.memory_phases import tracked
from recon.scopes import BlockDistillation, FullRetraining, MatrixReconstruction, SubmoduleDistillation
from tests.support.scope_fixtures import IGNORED, data_of, save_tiny, trainer_of
from tests.support.slow import slow

pytestmark = [pytest.mark.filterwarnings("error"), *(pytest.mark.filterwarnings(one) for one in IGNORED)]

DEPTHS = (2, 3, 5)
NUM, HELD_OUT, SEQ = 12, 4, 16
HIDDEN = 4 * (NUM + HELD_OUT) * SEQ * 32
"""One copy of the hidden states."""


def phases_of(kind: Any, depth: int, path: Path, **options: Any) -> list[dict[str, Any]]:
    """What was written of the phases of a run on a model of this depth."""
    gc.collect()  # of what other tests have left
    path.mkdir()
    scope = kind(name=save_tiny("llama", path, num_hidden_layers=depth), **options)
    scope.directory = path
    trainer, data = trainer_of(MaskEnforcer(), MemoryProfiler(print_table=False)), data_of(NUM, HELD_OUT, SEQ)
    phases = scope.phases = Phases(trainer.callbacks)
    with phases.run(path):
        phases.enter("load")
        scope.load(data)
        phases.enter("prune")
        replay, tokens = scope.to(torch.device("cpu")).open_replay(), data.tokens("train")
        options = {"replay": replay, "storage": scope.storage}
        masks = prune_to(path / "masks", scope.model, tokens, Wanda(), Unstructured(0.5), **options)
        phases.enter("prepare")
        scope.prepare(data, masks, path)
        phases.enter("train")
        trainer.fit(scope)
    return json.loads((path / "memory.json").read_text())["phases"]


@pytest.mark.parametrize("offload", ["host", slow("disk")])
@pytest.mark.parametrize("kind", [slow(MatrixReconstruction), SubmoduleDistillation, slow(BlockDistillation)])
def test_the_device_holds_as_much_for_a_model_of_any_depth(kind: Any, offload: str, tmp_path: Path) -> None:
    options = {"offload": offload, "activations": "host", "batch_size": 4}
    if kind is not MatrixReconstruction:
        options["epochs"] = 1
    peaks, pruning = [], []
    for depth in DEPTHS:
        phases = phases_of(kind, depth, tmp_path / str(depth), **options)
        assert sum(phase["phase"].startswith("window") for phase in phases) % depth == 0
        peaks.append(max(tracked(phase, "device") for phase in phases))
        pruning += [tracked(phase, "device") for phase in phases if phase["phase"] == "prune"]
        assert max(phase["categories"]["host"]["calibration"] for phase in phases) <= 3 * HIDDEN
        assert max(phase["categories"]["device"]["calibration"] for phase in phases) == 0
    assert max(peaks) <= 1.02 * min(peaks)
    assert max(pruning) <= 1.02 * min(pruning)


@pytest.mark.slow
def test_full_retraining_holds_more_for_each_block(tmp_path: Path) -> None:
    peaks = []
    for depth in DEPTHS:
        phases = phases_of(FullRetraining, depth, tmp_path / str(depth), epochs=2)
        peaks.append(tracked(phases[-1], "device"))
    a_block = peaks[1] - peaks[0]
    assert (peaks[2] - peaks[1]) / 2 == pytest.approx(a_block, rel=0.02)
    assert a_block >= 4 * 4 * 9216  # weights, gradients and both moments; other tests' tensors count in `peaks` alone


@pytest.mark.slow
def test_a_model_larger_than_a_budget_ends_at_the_same_bits(tmp_path: Path) -> None:
    """Half of the model's bytes are the budget, of device and host together, in every phase from loading on."""
    options = {"epochs": 1, "batch_size": 4}
    in_memory = phases_of(BlockDistillation, 8, tmp_path / "memory", **options)
    on_disk = phases_of(BlockDistillation, 8, tmp_path / "disk", offload="disk", activations="disk", **options)
    most, most_on_disk = (max(weights_in(phase) for phase in phases) for phases in (in_memory, on_disk))
    assert most >= 4 * 8 * 9216
    assert most_on_disk <= most / 2
    windows = sorted(path.name for path in (tmp_path / "memory" / "windows").glob("*.safetensors"))
    assert len(windows) == 8
    for name in windows:
        one, other = (load_file(tmp_path / place / "windows" / name) for place in ("memory", "disk"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[weight], other[weight]) for weight in one)


def weights_in(phase: dict[str, Any]) -> int:
    return sum(categories["weights"] for categories in phase["categories"].values())
