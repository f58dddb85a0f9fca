"""Memory by category in whole runs, against bytes counted by hand."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger

from callbacks import MaskEnforcer, MemoryProfiler
from recon.cli.report import main as report
from recon.profiling.entries import CATEGORIES, SIDES
from recon.profiling.out_of_memory import FULL_CURES, LOCAL_CURES, advice, full_side
from recon.profiling.phases import Phases
from recon.report.memory_phases import fold_windows, phases_section, sides_of, tracked
from recon.scopes import BlockDistillation, FullRetraining, MatrixReconstruction, SubmoduleDistillation
from tests.support.scope_fixtures import IGNORED, data_of, random_masks, save_tiny, trainer_of, weights_of
from tests.support.slow import slow

pytestmark = [pytest.mark.filterwarnings("error"), *(pytest.mark.filterwarnings(one) for one in IGNORED)]

MIB = 2**20
HIDDEN = 4 * (10 + 5) * 16 * 32
"""One copy of the hidden states of all calibration and held-out sequences."""

TOKENS = 8 * (10 + 5 + 5) * 16
"""Token ids of all three splits."""

PACKED_MASKS, BOOL_MASKS = 3 * 9216 // 8, 9216
"""All masks as they are held, and those of one block unpacked, a byte a weight."""


class Scalars(DummyLogger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        self.logged.append((step, metrics))


def run(
    scope: Any, tmp_path: Path, profiler: Any = None, logger: Any = None, num: int = 10, **options: Any
) -> dict[str, Any]:
    """A run as `recon fit` does it, in short; phase -> what was written of it."""
    gc.collect()  # of what other tests have left
    gc.freeze()  # nor does what they hold count
    trainer = trainer_of(MaskEnforcer(), profiler or MemoryProfiler(print_table=False), **options)
    trainer.loggers = [] if logger is None else [logger]
    phases = scope.phases = Phases(trainer.callbacks)  # type: ignore[attr-defined]
    data = data_of(num=num)
    with phases.run(tmp_path):
        phases.enter("load")
        scope.load(data)
        phases.enter("prepare")
        directory = tmp_path if scope.offload == "disk" else None
        scope.prepare(data, random_masks(scope.model), directory)
        phases.enter("train")
        trainer.fit(scope)
        phases.enter("save")
    return {phase["phase"]: phase for phase in json.loads((tmp_path / "memory.json").read_text())["phases"]}


def of(phase: dict[str, Any]) -> dict[str, int]:
    return phase["categories"]["device"]


def bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_windows_of_blocks_hold_what_is_counted_by_hand(tmp_path: Path) -> None:
    scope = BlockDistillation(name=save_tiny("llama", tmp_path), epochs=1, batch_size=4, activations="device")
    phases = run(scope, tmp_path)
    for number, window in enumerate(scope.windows):
        found, moment = of(phases[f"window {number:03d}"]), phases[f"window {number:03d}"]["moment"]["device"]
        owned = [scope.model.get_parameter(name) for name in window.owned]
        assert tuple(found) == CATEGORIES
        assert found["weights"] == bytes_of(scope.model.parameters())
        assert found["gradients"] == bytes_of(owned)
        assert found["optimizer"] == 2 * bytes_of(owned) + 4 * len(owned)  # two moments and a count
        assert found["calibration"] == 2 * HIDDEN
        assert found["gram"] == 0
        assert found["masks"] == BOOL_MASKS  # those of this window
        host = phases[f"window {number:03d}"]["categories"]["host"]
        expected = {"weights": bytes_of(owned), "masks": PACKED_MASKS, "other": TOKENS}  # the window's start
        assert {name: size for name, size in host.items() if size} == expected
        assert found["activations"] > 4 * 4 * 16 * 32
        assert moment["stage"].startswith("step 2, ")


@pytest.mark.parametrize("activations", ["device", "host"])
@pytest.mark.parametrize("offload", ["host", slow("disk")])
def test_offloaded_windows_have_one_block_on_the_device(offload: Any, activations: Any, tmp_path: Path) -> None:
    name = save_tiny("llama", tmp_path)
    options = {"offload": offload, "activations": activations}
    scope = BlockDistillation(name=name, epochs=1, batch_size=4, **options)
    phases = run(scope, tmp_path)
    block = 4 * (9216 + 2 * 32)
    # Embedding, head, last norm, inverse frequencies as they are and as they were; without data a number a parameter.
    on_host = 4 * (2 * 96 * 32 + 32) + 2 * 4 * 4 + (3 * block if offload == "host" else 3 * 9 * 4)
    for window in scope.windows:
        device, host = (phases[f"window {window.name}"]["categories"][side] for side in SIDES)
        num = len(window.owned)
        assert (device["weights"], device["gradients"], device["optimizer"]) == (block, block, 2 * block + 4 * num)
        assert device["masks"] == BOOL_MASKS
        assert device["gram"] == 0
        assert host["gradients"] == host["optimizer"] == host["activations"] == host["gram"] == 0
        assert (host["masks"], host["other"]) == (PACKED_MASKS, TOKENS)
        assert device["calibration"] == (0 if activations == "host" else 2 * HIDDEN)
        assert host["weights"] == on_host + block  # the window's start
        assert host["calibration"] == 2 * HIDDEN - device["calibration"]


def test_all_phases_hold_the_weights_and_add_up(tmp_path: Path) -> None:
    scope = SubmoduleDistillation(name=save_tiny("llama", tmp_path), epochs=1, batch_size=4, activations="device")
    phases = run(scope, tmp_path)
    assert list(phases)[:4] == ["load", "prepare", "train", "embed"]
    for phase in phases.values():
        assert of(phase)["weights"] == bytes_of(scope.model.parameters())
        assert tracked(phase, "device") == sum(of(phase).values())
        assert phase["categories"].keys() == phase["moment"].keys() == {"device", "host"}
    assert of(phases["load"])["calibration"] == phases["load"]["categories"]["host"]["masks"] == 0
    assert phases["save"]["categories"]["host"]["masks"] == PACKED_MASKS
    assert of(phases["embed"])["calibration"] in (HIDDEN * 2 // 3, HIDDEN)  # the held-out ones may come later
    for number in range(3):
        assert of(phases[f"window {number:03d}.mlp"])["calibration"] == 3 * HIDDEN  # with attention's output
    # query, key and value share their inputs, so do gate and up; the fourth is twice as wide
    first = of(phases["window 000.attention"])
    assert first["gram"] == 4 * (3 * 32 * 32 + 64 * 64)
    assert phases["window 000.attention"]["moment"]["device"]["stage"] == "solve"
    assert of(phases["save"])["calibration"] == of(phases["save"])["gradients"] == 0


def test_the_matrix_scope_holds_gram_matrices_instead_of_gradients(tmp_path: Path) -> None:
    scope = MatrixReconstruction(name=save_tiny("llama", tmp_path), batch_size=4, activations="device")
    phases = run(scope, tmp_path)
    for number in range(3):
        found = of(phases[f"window {number:03d}"])
        assert found["gram"] == 4 * (3 * 32 * 32 + 64 * 64)
        assert found["calibration"] == 2 * HIDDEN
        assert found["gradients"] == found["optimizer"] == found["activations"] == 0


def test_full_retraining_with_and_without_checkpoints(tmp_path: Path) -> None:
    name, found = save_tiny("llama", tmp_path), {}
    for checkpoints in (False, True):
        scope = FullRetraining(name=name, epochs=2, gradient_checkpointing=checkpoints)
        found[checkpoints] = of(run(scope, tmp_path)["train"])
        trained = [parameter for parameter in scope.model.parameters() if parameter.requires_grad]
        assert found[checkpoints]["optimizer"] == 2 * bytes_of(trained) + 4 * len(trained)
        assert found[checkpoints]["masks"] == 3 * BOOL_MASKS
    assert found[False]["gradients"] == bytes_of(trained)
    assert found[True]["activations"] < 0.7 * found[False]["activations"]


def test_accumulation_follows_the_batch_that_steps(tmp_path: Path) -> None:
    scope = FullRetraining(name=save_tiny("llama", tmp_path), epochs=2)
    phase = run(scope, tmp_path, num=16, accumulate_grad_batches=2)["train"]
    trained = [parameter for parameter in scope.model.parameters() if parameter.requires_grad]
    assert of(phase)["gradients"] == bytes_of(trained)
    assert of(phase)["optimizer"] == 2 * bytes_of(trained) + 4 * len(trained)


@pytest.mark.parametrize(
    "kind", [slow(MatrixReconstruction), SubmoduleDistillation, slow(BlockDistillation), FullRetraining]
)
def test_following_leaves_every_bit_as_it_was(kind: Any, tmp_path: Path) -> None:
    found = []
    for by_category in (False, True):
        scope = kind(name=save_tiny("llama", tmp_path))
        phases = run(scope, tmp_path, MemoryProfiler(print_table=False, by_category=by_category))
        assert all(bool(phase["categories"]) == by_category for phase in phases.values())
        found.append(weights_of(scope.model))
    assert all(torch.equal(weight, found[1][name]) for name, weight in found[0].items())


def test_scalars_are_logged_window_by_window_and_once_for_full_retraining(tmp_path: Path) -> None:
    name, scalars = save_tiny("llama", tmp_path), Scalars()
    phases = run(BlockDistillation(name=name, epochs=1, batch_size=4), tmp_path, logger=scalars)
    logged = [(step, metrics) for step, metrics in scalars.logged if "memory/device/tracked_mib" in metrics]
    assert [step for step, _ in logged] == [0, 1, 2]
    for number, metrics in logged:
        expected = {}
        for side, sizes in phases[f"window {number:03d}"]["categories"].items():
            expected |= {f"memory/{side}/{category}_mib": size / MIB for category, size in sizes.items()}
            expected[f"memory/{side}/tracked_mib"] = sum(sizes.values()) / MIB
        assert metrics == expected
    full = Scalars()
    run(FullRetraining(name=name, epochs=1), tmp_path, logger=full)
    assert len([metrics for _, metrics in full.logged if "memory/device/tracked_mib" in metrics]) == 1


# --- running out of memory ----------------------------------------------------------------------------


def failing(kind: Any, error: BaseException, at_step: int) -> Any:
    """A scope whose training step fails once its forward pass is done."""

    class Failing(kind):  # type: ignore[misc]
        num_steps = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.num_steps += 1
            if self.num_steps == at_step:
                raise error
            return loss

    return Failing


@pytest.mark.parametrize("at_step", [2, 4])  # followed, and not
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_running_out_of_memory_says_what_was_live_and_what_would_help(
    at_step: int, error: type[BaseException], tmp_path: Path
) -> None:
    scope = failing(FullRetraining, error("no more"), at_step)(name=save_tiny("llama", tmp_path), epochs=4)
    with pytest.raises(MemoryError, match=r"memory ran out in phase 'train'; live tensors were weights 0\.1 MiB, .*"):
        run(scope, tmp_path)
    content = json.loads((tmp_path / "memory.json").read_text())
    shortage = content["out_of_memory"]
    trained = [parameter for parameter in scope.model.parameters() if parameter.requires_grad]
    live = shortage["categories"]["device"]
    assert live["weights"] == bytes_of(scope.model.parameters())
    assert live["optimizer"] == 2 * bytes_of(trained) + 4 * len(trained)
    assert shortage["phase"] == content["phases"][-1]["phase"] == "train"
    assert len(shortage["largest"]) == 10
    sizes = [one["bytes"] for one in shortage["largest"]]
    assert sizes == sorted(sizes, reverse=True)
    mlp = {"owner": "model.layers.0.mlp.up_proj.weight", "category": "optimizer", "side": "device"}
    mlp_bytes = 2 * 4 * 64 * 32 + 4
    assert mlp | {"bytes": mlp_bytes} in shortage["largest"] or sizes[-1] >= mlp_bytes
    largest = max(live, key=lambda category: live[category])
    assert FULL_CURES["host"][largest] in shortage["advice"]  # type: ignore[index]
    assert torch._C._len_torch_dispatch_stack() == 0


def fail_in(phases: Phases, tmp_path: Path, error: Exception) -> None:
    with phases.run(tmp_path):
        phases.enter("prune")
        held = torch.ones(1000, 1000)
        raise error
    assert len(held) == 1000


def test_it_may_happen_before_the_fit_and_other_errors_are_let_through(tmp_path: Path) -> None:
    for error, expected in ((MemoryError("no more"), "memory ran out in phase 'prune'"), (KeyError("other"), "other")):
        phases = Phases([MemoryProfiler(print_table=False)])
        with pytest.raises((MemoryError, KeyError), match=expected):
            fail_in(phases, tmp_path, error)
        content = json.loads((tmp_path / "memory.json").read_text())
        assert ("out_of_memory" in content) == isinstance(error, MemoryError)
        if isinstance(error, MemoryError):
            assert content["out_of_memory"]["categories"]["device"]["other"] >= 4_000_000
    assert torch._C._len_torch_dispatch_stack() == 0


ON_HOST = (
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported ..."),
    torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in ..."),  # pinned
)
ON_DEVICE = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    torch.distributed.DistBackendError(
        "NCCL error in: NCCLUtils.hpp:275, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"
    ),
)
OTHER = (
    None,
    ValueError("out of memory"),
    RuntimeError("shape"),
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    torch.distributed.DistBackendError("Last error:\nCuda failure 1 'invalid argument'"),
)


@pytest.mark.parametrize(("errors", "side"), [(ON_HOST, "host"), (ON_DEVICE, "device"), (OTHER, None)])
def test_the_side_that_ran_out_is_known_by_the_error(errors: tuple[Any, ...], side: Any) -> None:
    assert [full_side(error) for error in errors] == [side] * len(errors)


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("cures", [FULL_CURES, LOCAL_CURES])
def test_each_category_has_its_cure(cures: Any, category: Any) -> None:
    device: Any = dict.fromkeys(CATEGORIES, MIB) | {category: 3 * MIB}
    host: Any = dict.fromkeys(CATEGORIES, MIB // 2) | {category: MIB}
    live: Any = {"device": device, "host": host}
    for full, mib in (("device", "3.0"), ("host", "1.0"), (None, "4.0")):
        text = advice(live, full, "window 003", cures)  # type: ignore[arg-type]
        assert text.endswith(cures[full or "host"][category])
        assert ("of the host" in text) == (full == "host")
        assert "'window 003'" in text
        assert f"({mib} MiB)" in text


# --- recon report --memory ----------------------------------------------------------------------------


def phase(name: str, mib: float, device: str = "cpu", seconds: float = 1.0) -> dict[str, Any]:
    sizes = {category: int(mib * MIB * (index + 1)) for index, category in enumerate(CATEGORIES)}
    return {
        "phase": name,
        "seconds": seconds,
        "host_bytes": 0,
        "device_allocated_bytes": None if device == "cpu" else int(40 * mib * MIB),
        "device_reserved_bytes": None if device == "cpu" else int(44 * mib * MIB),
        "split": None,
        "categories": {"device": sizes, "host": dict.fromkeys(CATEGORIES, 0) if device == "cpu" else sizes},
        "moment": {one: {"stage": "step 2, backward", "seconds": 0.1, "operation": None} for one in SIDES},
    }


def windows(num: int, device: str = "cpu") -> list[dict[str, Any]]:
    return [phase(f"window {index:03d}.mlp", 1 + index % 7, device) for index in range(num)]


def write(path: Path, phases: list[dict[str, Any]], device: str = "cpu") -> None:
    path.mkdir(exist_ok=True)
    content = {"method": "", "device": device, "baseline_host_bytes": 0, "phases": phases}
    (path / "memory.json").write_text(json.dumps(content))


def test_many_windows_are_folded_into_the_largest() -> None:
    phases = [phase("load", 1), *windows(40), phase("save", 1)]
    folded = fold_windows(phases, 12, lambda one: tracked(one, "device"))
    assert [one["phase"] for one in folded] == ["load", "40 windows, largest 006.mlp", "save"]
    assert folded[1]["seconds"] == 40
    assert folded[1]["categories"] == phases[7]["categories"]
    assert fold_windows(phases, 40) == phases


def test_the_table_has_a_row_a_phase_and_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phases = [phase("load", 100), phase("evaluate dense and pruned", 1), *windows(40), phase("save", 0.01)]
    write(tmp_path / "x", phases)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "100")
        assert report([str(tmp_path / "x"), "--memory"]) == 0
    printed = capsys.readouterr().out
    table = printed[: printed.index("tracked: all")].splitlines()
    assert all(len(line) <= 100 for line in table)
    assert "40 windows, largest" in printed
    (row,) = (line.split() for line in table if line.startswith("load"))
    number = [str(100 * index) + ".0" for index in range(1, 9)]
    assert row == ["load", *number, "3,600"]
    assert {path.name for path in (tmp_path / "x").iterdir()} == {"memory.json", "memory.png", "memory.svg"}
    svg = (tmp_path / "x" / "memory.svg").read_text()
    assert all(f">{text}<" in svg for text in ("load", "evaluate dense and pruned", "calibration activations", "masks"))


def test_a_device_comes_before_the_host_with_what_its_allocator_had(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phases = [phase("load", 1), *windows(3, "cuda:0")]
    assert sides_of(phases) == ["device", "host"]
    assert sides_of(phases[:1]) == ["device"]
    section = phases_section(phases, "host", "cuda:0")
    assert [row[0].splitlines()[0] for row in section.rows] == ["3 windows, largest 002.mlp"]
    write(tmp_path / "x", phases, "cuda:0")
    assert report([str(tmp_path / "x"), "--memory"]) == 0
    printed = capsys.readouterr().out
    assert 0 <= printed.index("live tensors on cuda:0") < printed.index("live tensors on the host")
    assert "allocator: reserved" in (tmp_path / "x" / "memory.svg").read_text()


def test_what_was_not_tracked_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs the directory of a run with memory\.json.*got"):
        report([str(tmp_path), "--memory"])
    old = phase("load", 1)
    del old["categories"], old["moment"]
    write(tmp_path, [old])
    with pytest.raises(ValueError, match="has no categories; run it again"):
        report([str(tmp_path), "--memory"])


def test_a_real_run_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    run(BlockDistillation(name=save_tiny("llama", tmp_path), epochs=1, batch_size=4), tmp_path)
    assert report([str(tmp_path), "--memory"]) == 0
    assert "3 windows, largest" in capsys.readouterr().out
