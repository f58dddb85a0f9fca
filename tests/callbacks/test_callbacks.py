import gc
import io
import json
import re
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from callbacks import MaskEnforcer, MemoryProfiler, Progress, memory_profiler
from callbacks.mask_enforcer import ZERO_KEEPING
from callbacks.progress import _clock
from recon.profiling import process_memory as memory
from recon.profiling.phases import Phases
from recon.scopes import BlockDistillation, FullRetraining, MatrixReconstruction, SubmoduleDistillation
from tests.support.scope_fixtures import IGNORED, prepared, save_tiny, trainer_of, weights_of

pytestmark = [pytest.mark.filterwarnings("error"), *(pytest.mark.filterwarnings(one) for one in IGNORED)]

MIB = 2**20
WEIGHT = "model.layers.0.mlp.up_proj.weight"


# --- MaskEnforcer -------------------------------------------------------------------------------------


class Sign(torch.optim.Optimizer):
    """Moves every weight by lr, whatever its gradient: no zero stays."""

    def __init__(self, parameters: Any, lr: float = 1e-3) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = closure() if closure else None
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_((parameter.grad >= 0).float() - 0.5, alpha=group["lr"])
        return loss


class WithOptimizer(FullRetraining):
    """Full retraining by an optimizer of the test's choice."""

    optimizer: ClassVar[Any]

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.model.parameters() if p.requires_grad and p.ndim == 2]
        return type(self).optimizer(matrices)


def with_optimizer(make: Any, tmp_path: Path, data: Any = None) -> FullRetraining:
    scope = type("Scope", (WithOptimizer,), {"optimizer": staticmethod(make)})
    return prepared(scope(name=save_tiny("llama", tmp_path), epochs=2), data)


@pytest.mark.parametrize("optimizer", [Sign, *([torch.optim.Muon] if hasattr(torch.optim, "Muon") else [])])
def test_an_optimizer_that_moves_zeros_is_refused_by_name(optimizer: Any, tmp_path: Path) -> None:
    scope = with_optimizer(optimizer, tmp_path)
    dense = weights_of(scope.model)
    with pytest.raises(ValueError, match=rf"keeps zeros at zero .*AdamW.*, got {optimizer.__name__}$"):
        trainer_of(MaskEnforcer()).fit(scope)
    assert all(torch.equal(weight, dense[name]) for name, weight in weights_of(scope.model).items())


@pytest.mark.parametrize("optimizer", [Sign, *([torch.optim.Muon] if hasattr(torch.optim, "Muon") else [])])
def test_the_refused_ones_do_move_zeros(optimizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recon.scopes.enforcement.ZERO_KEEPING", (torch.optim.Optimizer,))
    with pytest.raises(ValueError, match="pruned weights need to be zero, got"):
        trainer_of(MaskEnforcer()).fit(with_optimizer(optimizer, tmp_path))


@pytest.mark.parametrize("optimizer", ZERO_KEEPING)
def test_the_accepted_ones_keep_exact_zeros_with_momentum_and_weight_decay(optimizer: Any, tmp_path: Path) -> None:
    options = {"lr": 1e-2, "weight_decay": 0.1}
    if optimizer in (torch.optim.SGD, torch.optim.RMSprop):
        options["momentum"] = 0.9
    scope = with_optimizer(lambda parameters: optimizer(parameters, **options), tmp_path)
    dense = weights_of(scope.model)
    trainer_of(MaskEnforcer()).fit(scope)
    assert scope.masks.violations(scope.model) == 0
    assert not torch.equal(scope.model.get_parameter(WEIGHT), dense[WEIGHT])


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_gradients_under_the_mask_are_zero_even_if_they_were_infinite(bad: float, tmp_path: Path) -> None:
    class Probe(Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            weight, keep = pl_module.model.get_parameter(WEIGHT), pl_module.masks[WEIGHT]
            (weight * torch.where(keep, 3.0, bad)).sum().backward()
            self.gradient = weight.grad.clone()
            weight.grad = None

    scope, probe = prepared(FullRetraining(name=save_tiny("llama", tmp_path), epochs=1)), Probe()
    trainer_of(MaskEnforcer(), probe).fit(scope)
    assert torch.equal(probe.gradient, 3.0 * scope.masks[WEIGHT])


def test_the_hooks_go_with_the_fit_and_come_once_with_the_next(tmp_path: Path) -> None:
    enforcer = MaskEnforcer()
    name = save_tiny("llama", tmp_path)
    for _ in range(2):
        scope = prepared(FullRetraining(name=name, epochs=1))
        trainer_of(enforcer).fit(scope)
        weight = scope.model.get_parameter(WEIGHT)
        assert not weight._backward_hooks
    broken = prepared(FullRetraining(name=name, epochs=1))

    class Break(Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            assert len(pl_module.model.get_parameter(WEIGHT)._backward_hooks) == 1
            raise InterruptedError

    for _ in range(2):  # a fit that failed leaves its hooks to the next start
        with pytest.raises(InterruptedError):
            trainer_of(enforcer, Break()).fit(broken)


def test_a_weight_that_is_not_zero_at_the_start_stops_the_fit(tmp_path: Path) -> None:
    scope = prepared(FullRetraining(name=save_tiny("llama", tmp_path), epochs=1))
    pruned = (~scope.masks[WEIGHT]).nonzero()[0].tolist()
    with torch.no_grad():
        scope.model.get_parameter(WEIGHT)[tuple(pruned)] = 1e-30
    trainer = trainer_of(MaskEnforcer())
    with pytest.raises(ValueError, match=rf"got 1 of \d+ in `{re.escape(WEIGHT)}`"):
        trainer.fit(scope)
    assert trainer.global_step == 0


def test_the_enforcer_leaves_frozen_parameters_frozen(tmp_path: Path) -> None:
    class Look(Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            assert not any(parameter.requires_grad for parameter in pl_module.model.parameters())

    scope = prepared(BlockDistillation(name=save_tiny("llama", tmp_path), epochs=1, batch_size=4))
    trainer_of(MaskEnforcer(), Look()).fit(scope)


def test_only_scopes_have_masks_to_enforce() -> None:
    class Plain(L.LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> None: ...

        def train_dataloader(self) -> list[int]:
            return [0]

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return []

    with pytest.raises(ValueError, match="needs one of recon's scopes, got Plain"):
        trainer_of(MaskEnforcer(), max_epochs=1).fit(Plain())


# --- Progress -----------------------------------------------------------------------------------------


class Clock(Callback):
    """A batch takes a second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("callbacks.progress.time", SimpleNamespace(monotonic=lambda: self.now))

    def on_train_batch_end(self, *args: Any) -> None:
        self.now += 1


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for line in caplog.messages if line.startswith(("window", "epoch"))]


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level("INFO", "recon")
    return caplog


def test_progress_of_a_local_scope(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: pytest.LogCaptureFixture
) -> None:
    scope = prepared(SubmoduleDistillation(name=save_tiny("llama", tmp_path), epochs=2, batch_size=4, lr=1e-3))
    trainer_of(MaskEnforcer(), Clock(monkeypatch), Progress(every_seconds=0.0)).fit(scope)
    lines = lines_of(told)
    assert len(lines) == 6 * 2 * 3  # windows, epochs, batches
    number = r"\d\.?\d*(e-\d+)?"
    for index, line in enumerate(lines):
        window, epoch, batch = index // 6, index // 3 % 2, index % 3
        name = scope.windows[window].name
        error = rf"  held out error {number}" if batch == 2 else ""
        pattern = (
            rf"window {window + 1}/6  {re.escape(name)}  epoch {epoch + 1}/2  {(index + 1) / 36:4.0%}"
            rf"  loss {number}{error}  {_clock(index + 1.0)} spent  {_clock(35.0 - index)} left"
        )
        assert re.fullmatch(pattern, line), line
        if batch == 2 and epoch == 1:
            assert f"held out error {scope.results[name]['after']:.4g}  " in line
    assert len({re.search(r"loss \S+", line)[0] for line in lines}) > 30  # type: ignore[index]


def test_progress_of_full_retraining(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: pytest.LogCaptureFixture
) -> None:
    scope = prepared(FullRetraining(name=save_tiny("llama", tmp_path), epochs=2))
    trainer = trainer_of(MaskEnforcer(), Clock(monkeypatch), Progress(every_seconds=2.5))
    trainer.fit(scope)
    first, second = lines_of(told)  # within an epoch not before 2.5 seconds have passed
    assert re.fullmatch(r"epoch 1/2   50%  loss \S+  held out loss \S+  0:03 spent  0:03 left", first)
    loss, held_out = (f"{trainer.callback_metrics[name].item():.4g}" for name in ("loss", "held_out_loss"))
    assert second == f"epoch 2/2  100%  loss {loss}  held out loss {held_out}  0:06 spent  0:00 left"


def test_progress_ends_at_a_limit_of_steps(tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    scope = prepared(FullRetraining(name=save_tiny("llama", tmp_path), epochs=2))
    trainer_of(Progress(every_seconds=3600.0), max_steps=4).fit(scope)
    (line,) = lines_of(told)
    assert line.startswith("epoch 2/2  100%  loss ")


def test_progress_of_the_matrix_scope(tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    scope = prepared(MatrixReconstruction(name=save_tiny("llama", tmp_path), batch_size=4))
    trainer_of(MaskEnforcer(), Progress(every_seconds=0.0)).fit(scope)
    lines = lines_of(told)
    assert [line.split("  ")[:2] for line in lines] == [[f"window {i + 1}/3", f"00{i}"] for i in range(3)]
    assert all(re.search(r"  matrix error \S+  held out error \S+  ", line) for line in lines)


def test_progress_says_little_unless_asked_and_always_the_end(tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    scope = prepared(BlockDistillation(name=save_tiny("llama", tmp_path), epochs=2, batch_size=4, lr=1e-3))
    trainer_of(MaskEnforcer(), Progress(every_seconds=1e6)).fit(scope)
    (line,) = lines_of(told)
    assert line.startswith("window 3/3  002  epoch 2/2  100%")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0:00"), (59.6, "1:00"), (61.0, "1:01"), (3725.0, "1:02:05"), (360000.0, "100:00:00")]
)
def test_times_are_read_at_a_glance(seconds: float, text: str) -> None:
    assert _clock(seconds) == text


# --- MemoryProfiler -----------------------------------------------------------------------------------


def profiled_run(tmp_path: Path, profiler: MemoryProfiler) -> dict[str, Any]:
    """A run as `recon fit` does it, in short; what the profiler wrote."""
    trainer = trainer_of(MaskEnforcer(), profiler)
    scope = SubmoduleDistillation(name=save_tiny("llama", tmp_path), epochs=1, batch_size=4)
    phases = scope.phases = Phases(trainer.callbacks)  # type: ignore[attr-defined]
    with phases.run(tmp_path):
        phases.enter("load")
        prepared(scope)
        phases.enter("train")
        trainer.fit(scope)
        phases.enter("save")
    return json.loads((tmp_path / "memory.json").read_text())


@pytest.mark.parametrize("exact", [True, False])
def test_memory_is_written_phase_by_phase(exact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exact:
        monkeypatch.setattr(memory, "CLEAR_REFS", Path("/no/such/directory/clear_refs"))
    profiler = MemoryProfiler(print_table=False)
    if exact and not profiler._meter.exact:
        pytest.skip("needs a /proc/self/clear_refs that may be written")
    content = profiled_run(tmp_path, profiler)
    windows = [f"window {index:03d}.{part}" for index in range(3) for part in ("attention", "mlp")]
    assert [phase["phase"] for phase in content["phases"]] == ["load", "train", "embed", "search", *windows, "save"]
    assert content["method"] == ("VmHWM, reset per phase" if exact else "resident size sampled every 5 ms")
    assert content["baseline_host_bytes"] > 0
    for phase in content["phases"]:
        assert isinstance(phase["host_bytes"], int)
        assert phase["host_bytes"] > 0
        assert phase["seconds"] >= 0
        device = {"device_allocated_bytes", "device_reserved_bytes"}
        assert phase.keys() == {"phase", "seconds", "host_bytes", *device, "split", "categories", "moment"}


@pytest.mark.parametrize("exact", [True, False])
def test_a_phase_that_failed_is_written_with_its_peak(
    exact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exact:
        monkeypatch.setattr(memory, "CLEAR_REFS", Path("/no/such/directory/clear_refs"))
    phases = Phases([MemoryProfiler()])

    def run() -> None:
        with phases.run(tmp_path):
            phases.enter("before")
            phases.enter("too large")
            block = np.ones(64 * MIB // 8)
            time.sleep(0.05)
            del block
            raise MemoryError

    with pytest.raises(MemoryError):
        run()
    gc.unfreeze()  # the run did not end
    before, failed = json.loads((tmp_path / "memory.json").read_text())["phases"]
    assert (before["phase"], failed["phase"]) == ("before", "too large")
    assert failed["host_bytes"] - before["host_bytes"] >= 60 * MIB
    assert failed["seconds"] >= 0.05


def test_a_second_run_begins_a_new_file(tmp_path: Path) -> None:
    phases = Phases([MemoryProfiler(print_table=False)])
    for name in ("first", "second"):
        with phases.run(tmp_path / name):
            phases.enter(name)
        (phase,) = json.loads((tmp_path / name / "memory.json").read_text())["phases"]
        assert phase["phase"] == name
        assert gc.get_freeze_count() == 0


def splits_of(scope: Any, tmp_path: Path, **options: Any) -> dict[str, dict[str, int] | None]:
    """Phase -> split of a fit."""
    profiler = MemoryProfiler(print_table=False)
    trainer = trainer_of(MaskEnforcer(), profiler, **options)
    phases = scope.phases = Phases(trainer.callbacks)  # type: ignore[attr-defined]
    with phases.run(tmp_path / "run"):
        phases.enter("train")
        trainer.fit(prepared(scope))
    return {phase["phase"]: phase["split"] for phase in profiler.phases}


def sizes(parameters: Iterable[torch.Tensor]) -> tuple[int, int]:
    """How many elements, in how many tensors."""
    numels = [parameter.numel() for parameter in parameters]
    return sum(numels), len(numels)


def test_each_window_is_split_into_all_weights_and_its_own_gradients_and_state(tmp_path: Path) -> None:
    scope = BlockDistillation(name=save_tiny("llama", tmp_path), epochs=1, batch_size=4)
    splits = splits_of(scope, tmp_path)
    assert splits.pop("train") is splits.pop("embed") is splits.pop("search") is None  # no steps of the fit
    num_all, _ = sizes(scope.model.parameters())
    assert list(splits) == ["window 000", "window 001", "window 002"]
    for window, split in zip(scope.windows, splits.values(), strict=True):
        num, tensors = sizes(scope.model.get_parameter(name) for name in window.owned)
        expected = {"weights_bytes": 4 * num_all, "gradients_bytes": 4 * num, "optimizer_bytes": 8 * num + 4 * tensors}
        assert split == {**expected, "on_host_bytes": sum(expected.values())}


def test_full_retraining_is_split_at_its_second_step(tmp_path: Path) -> None:
    scope = FullRetraining(name=save_tiny("llama", tmp_path), epochs=1)
    split = splits_of(scope, tmp_path, accumulate_grad_batches=2)["train"]  # three batches, two steps
    num, tensors = sizes(parameter for parameter in scope.model.parameters() if parameter.requires_grad)
    assert split is not None
    assert (split["gradients_bytes"], split["optimizer_bytes"]) == (4 * num, 8 * num + 4 * tensors)


def test_without_a_second_step_or_an_optimizer_nothing_is_split(tmp_path: Path) -> None:
    name = save_tiny("llama", tmp_path)
    assert splits_of(FullRetraining(name=name), tmp_path, max_steps=1) == {"train": None}
    matrices = splits_of(MatrixReconstruction(name=name, batch_size=4), tmp_path)
    assert len(matrices) == 5
    assert set(matrices.values()) == {None}


def test_a_footprint_is_taken_once_a_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    measure = memory_profiler.footprint
    monkeypatch.setattr(memory_profiler, "footprint", lambda *args: taken.append(1) or measure(*args))
    splits_of(FullRetraining(name=save_tiny("llama", tmp_path), epochs=4), tmp_path)
    assert len(taken) == 1


def test_the_table_folds_windows_and_is_printed_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    profiler = MemoryProfiler()
    content = profiled_run(tmp_path, profiler)
    table = capsys.readouterr().out
    assert f"Peak memory by phase in MiB (host: {content['method']})" in table
    windows = [phase for phase in content["phases"] if phase["phase"].startswith("window")]
    largest = max(windows, key=lambda phase: phase["host_bytes"])
    name, above = largest["phase"].removeprefix("window "), largest["host_bytes"] - content["baseline_host_bytes"]
    (row,) = (line.split() for line in table.splitlines() if "windows" in line)
    assert row[:4] == ["6", "windows,", "largest", name]
    split = [largest["split"][f"{part}_bytes"] for part in ("weights", "gradients", "optimizer")]
    sizes = (largest["host_bytes"], above, *split, above - sum(split))
    assert row[5:] == [f"{size / MIB:.0f}" for size in sizes]
    order = [table.index(name) for name in ("load", "train", "embed", "6 windows", "save")]
    assert order == sorted(order)
    profiled_run(tmp_path, MemoryProfiler(print_table=False))
    assert "Peak memory" not in capsys.readouterr().out


def test_the_table_tells_device_memory_from_the_hosts() -> None:
    profiler = MemoryProfiler()
    peaks = {"host_bytes": 900 * MIB, "device_allocated_bytes": 150 * MIB, "device_reserved_bytes": 200 * MIB}
    sizes = {"weights_bytes": 40, "gradients_bytes": 30, "optimizer_bytes": 80, "on_host_bytes": 90}
    split = {name: size * MIB for name, size in sizes.items()}
    profiler.phases = [{"phase": "train", "seconds": 1.0, **peaks, "split": split}]
    profiler._baseline = 500 * MIB
    file = io.StringIO()
    Console(file=file, width=100).print(profiler._table())
    row = file.getvalue().splitlines()[-1].split()
    assert row == ["train", "1.0", "900", "400", "150", "200", "40", "30", "80", "90"]  # 150 less 60 on the device
