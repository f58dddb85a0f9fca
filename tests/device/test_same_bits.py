"""What recon does on a device has the bits of the CPU, and mixes no devices: on the simulated one."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from callbacks import MemoryProfiler
from recon.experiment.baselines import measure, measure_pruned
from recon.experiment.checkpoints import Checkpoints
from recon.experiment.directory import RunDirectory
from recon.experiment.options import RunOptions
from recon.models.loading import ModelSource
from recon.models.windows import Windows
from recon.pruning.allocation import OWL, EqualErrors
from recon.pruning.criteria import ADMM, ALPS, RIA, Criterion, Magnitude, SparseFW, SparseGPT, Wanda
from recon.pruning.masks import Masks
from recon.pruning.patterns import NM, Pattern, Unstructured
from recon.pruning.prune import Pruning
from recon.scopes import BlockDistillation, FullRetraining, MatrixReconstruction, Scope, SubmoduleDistillation
from recon.solvers import ADMMSolver, GradientDescent
from tests.support.families import tiny
from tests.support.scope_fixtures import IGNORED, data_of, random_masks, same, save_tiny
from tests.support.simulated.device import simulated_cuda
from tests.support.simulated.runs import WANDA, run, run_on_device, weights_in
from tests.support.simulated.tags import CPU, CUDA
from tests.support.slow import slow

RESUMED = "ignore:Checkpoint directory .* exists and is not empty"
pytestmark = [pytest.mark.filterwarnings("error"), *(pytest.mark.filterwarnings(one) for one in (*IGNORED, RESUMED))]

QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 4}
INTERLEAVED = Pruning(inputs="recovered", batch_size=4)
SCOPES: dict[str, Callable[..., Scope]] = {
    "matrix": lambda **options: MatrixReconstruction(batch_size=4, **options),
    "submodule": lambda **options: SubmoduleDistillation(**QUICK, **options),
    "block": lambda **options: BlockDistillation(**QUICK, **options),
    "full": lambda **options: FullRetraining(epochs=1, **options),
}


@pytest.fixture(autouse=True)
def _fused_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU step as a device does: full retraining fuses AdamW there, which rounds otherwise."""
    monkeypatch.setattr(FullRetraining, "_steps_fused", True)


@dataclass(frozen=True)
class Case:
    """A recovery. Its baselines and drift are measured only where it says so."""

    scope: str
    model: dict[str, Any] = field(default_factory=dict)
    criterion: Criterion = field(default_factory=Wanda)
    pattern: Pattern = field(default_factory=lambda: Unstructured(0.5))
    pruning: Pruning = field(default_factory=Pruning)
    trainer: dict[str, Any] = field(default_factory=dict)
    family: str = "llama"
    measured: bool = False
    given: bool = False  # masks, so that the model is on the host until its fit
    alike: bool = False  # to another case, so that continuous integration leaves it to the slow tests

    @property
    def options(self) -> RunOptions:
        """Of the run."""
        masks = random_masks(tiny(self.family, num_hidden_layers=2)) if self.given else None
        return RunOptions(
            self.criterion, self.pattern, self.pruning, masks=masks, baselines=self.measured, drift=self.measured
        )


HOST, DISK = {"offload": "host"}, {"offload": "disk"}
CASES = {
    "attention and MLP": Case("submodule", measured=True),
    "offloaded to the host, interleaved": Case(
        "submodule",
        {**HOST, "activations": "host", "propagation": "recovered", "start": "moved"},
        SparseGPT(),
        pruning=INTERLEAVED,
        measured=True,
    ),
    "offloaded to disk": Case(
        "submodule",
        {**DISK, "activations": "disk", "propagation": "recovered_local", "start": "pruned"},
        RIA(),
        pruning=Pruning(allocation=OWL()),
        measured=True,
        alike=True,
    ),
    "groups of matrices": Case(
        "submodule",
        {"windows": Windows([["*.q_proj", "*.k_proj", "*.v_proj"], ["*.o_proj"], ["*.mlp.*"]])},
        alike=True,
    ),
    "overlapping blocks, adapters": Case(
        "block",
        {"num_blocks": 2, "stride": 1, "parameters": "lora", "loss": "cosine", "start": "pruned"},
        Magnitude(),
        Unstructured(0.5, per="model"),
    ),
    "blocks in bf16, all activations move": Case(
        "block",
        {**HOST, "activations": "auto", "activations_budget": "30KiB", "dtype": "bfloat16", "start": "moved"},
        ALPS(max_iterations=20),
        pruning=Pruning(inputs="pruned", batch_size=4),
    ),
    "Conv1D": Case("block", {"parameters": "vectors", "start": "exact"}, SparseFW(iterations=5), family="gpt2"),
    "autocast": Case("submodule", {"activations_dtype": "bfloat16"}, trainer={"precision": "bf16-mixed"}),
    "dense targets of recovered inputs": Case(
        "matrix", {"propagation": "recovered", "activations": "host"}, alike=True
    ),
    "matrices by descent": Case("matrix", {**DISK, "solver": GradientDescent(steps=3)}, pattern=NM(2, 4)),
    "matrices by ADMM": Case(
        "matrix",
        {**HOST, "solver": ADMMSolver(iterations=5), "start": "moved"},
        ADMM(iterations=5, mask_steps=3),
        pruning=Pruning(allocation=EqualErrors(num_sequences=4, num_densities=2)),
        alike=True,
    ),
    "full": Case("full", {"start": "exact"}, measured=True, trainer={"gradient_clip_val": 1.0}),
    "full, offloaded but in its fit": Case("full", {**HOST, "start": "exact"}, measured=True, alike=True),
    "full by distillation": Case(
        "full",
        {"loss": "distillation", "parameters": "lora"},
        trainer={"accumulate_grad_batches": 2, "precision": "bf16-mixed"},
        given=True,
    ),
}


def require_same(case: Case, path: Path) -> None:
    name = save_tiny(case.family, path, **{"n_layer" if case.family == "gpt2" else "num_hidden_layers": 2})
    on_device, _ = run_on_device(
        SCOPES[case.scope](name=name, **case.model), path / "device", case.options, **case.trainer
    )
    on_cpu = run(SCOPES[case.scope](name=name, **case.model), path / "cpu", CPU, case.options, **case.trainer)
    assert same(weights_in(path / "device"), weights_in(path / "cpu"))
    for figure in ("perplexity", "dense_perplexity", "pruned_perplexity", "drift", "mask_violations"):
        assert getattr(on_device, figure) == getattr(on_cpu, figure), figure


@pytest.mark.parametrize("case", [slow(name) if case.alike else name for name, case in CASES.items()])
def test_a_recovery(case: str, tmp_path: Path) -> None:
    require_same(CASES[case], tmp_path)


PRODUCT = [
    Case(scope, {"offload": offload, "activations": place, "propagation": propagation})
    for scope, offload, place, propagation in product(
        ("matrix", "submodule", "block"),
        ("none", "host", "disk"),
        ("device", "host", "disk"),
        ("dense", "recovered_local", "recovered"),
    )
]


@pytest.mark.slow
@pytest.mark.parametrize("case", PRODUCT, ids=lambda case: "-".join([case.scope, *case.model.values()]))
def test_every_place_with_every_propagation(case: Case, tmp_path: Path) -> None:
    require_same(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["phi", "falcon", "opt", "gemma2", "gptj"])
@pytest.mark.parametrize("scope", SCOPES)
def test_other_families(family: str, scope: str, tmp_path: Path) -> None:
    on_device, _ = run_on_device(SCOPES[scope](name=save_tiny(family, tmp_path)), tmp_path / "device")
    on_cpu = run(SCOPES[scope](name=save_tiny(family, tmp_path)), tmp_path / "cpu", CPU)
    assert same(weights_in(tmp_path / "device"), weights_in(tmp_path / "cpu"))
    assert on_device.perplexity == on_cpu.perplexity


@pytest.mark.parametrize(("criterion", "inputs"), [(SparseGPT(), "pruned"), slow(Wanda(), "dense")], ids=str)
def test_pruning_alone_and_a_test_of_its_masks(criterion: Criterion, inputs: Any, tmp_path: Path) -> None:
    source = ModelSource(save_tiny("llama", tmp_path, num_hidden_layers=2))
    options = RunOptions(criterion, Unstructured(0.5), Pruning(inputs=inputs, batch_size=4))

    def figures(device: torch.device) -> list[Any]:
        directory = RunDirectory(tmp_path / device.type, {})
        pruned = measure_pruned(source, data_of(), directory, options, device, keep_model=True)
        masks = Masks.load(directory.masks)
        tested = measure(source, data_of(), device, masks)
        return [pruned.perplexity, pruned.dense_perplexity, pruned.drift, tested.perplexity, masks.fingerprint()]

    with simulated_cuda():
        found = figures(CUDA)
    assert found == figures(CPU)
    assert same(weights_in(tmp_path / "cuda"), weights_in(tmp_path / "cpu"))


class Killed(Exception):
    pass


class Kill(Callback):
    """Ends a fit at one of its batches."""

    def __init__(self, batch: int) -> None:
        self.left = batch

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed


@pytest.mark.parametrize("scope", ["submodule", "full"])
def test_a_run_that_goes_on(scope: str, tmp_path: Path) -> None:
    name = save_tiny("llama", tmp_path, num_hidden_layers=2)
    options = RunOptions(Wanda(), Unstructured(0.5), baselines=False, drift=False)

    def watching(directory: str) -> list[Callback]:
        return [Checkpoints(tmp_path / directory / "checkpoints", 1)] if scope == "full" else []

    make, saving = SCOPES[scope], {"enable_checkpointing": scope == "full"}
    kill = Kill(2 if scope == "full" else 8)
    with pytest.raises(Killed):
        run_on_device(make(name=name), tmp_path / "device", options, *watching("device"), kill, **saving)
    run_on_device(make(name=name), tmp_path / "device", options, *watching("device"), **saving)
    run(make(name=name), tmp_path / "cpu", CPU, options, *watching("cpu"), **saving)
    assert same(weights_in(tmp_path / "device"), weights_in(tmp_path / "cpu"))


def test_the_profiler_sees_the_device(tmp_path: Path) -> None:
    name = save_tiny("llama", tmp_path, num_hidden_layers=2)
    profiler = MemoryProfiler(print_table=False)
    scope = BlockDistillation(**QUICK, name=name, offload="host", activations="host")
    run_on_device(scope, tmp_path / "run", WANDA, profiler)
    trained = [phase["categories"] for phase in profiler.phases if phase["phase"].startswith("window ")]
    assert trained
    for categories in trained:
        assert all(categories["device"][name] > 0 for name in ("weights", "gradients", "optimizer", "activations"))
        assert categories["host"]["calibration"] > 10 * categories["device"]["calibration"]  # batches of it alone
        assert categories["host"]["gradients"] == categories["host"]["activations"] == 0
