"""The best held-out weights: kept, restored, and found again by a run that was killed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from callbacks import MaskEnforcer
from recon.experiment import checkpoints
from recon.experiment.checkpoints import Checkpoints
from recon.scopes import FullRetraining
from recon.scopes.best import BestWeights
from recon.scopes.optimization import adamw
from tests.support.scope_fixtures import IGNORED, prepared, same, save_tiny, trainer_of, weights_of

pytestmark = [pytest.mark.filterwarnings(one) for one in ("error", *IGNORED)]

EPOCHS, STEPS, BEST = 5, 3, 2
"""Epochs, optimizer steps in each, and the epoch with the lowest held-out loss."""


@pytest.fixture(autouse=True)
def overfitting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let held-out losses fall up to epoch BEST and then rise."""
    held_out(monkeypatch, lambda epoch: abs(epoch - BEST))


def held_out(monkeypatch: pytest.MonkeyPatch, loss_of: Callable[[int], float]) -> None:
    def offer(best: BestWeights, loss: float, step: int, model: Any) -> None:
        OFFER(best, float(loss_of(step // STEPS - 1)), step, model)

    monkeypatch.setattr(BestWeights, "offer", offer)


OFFER = BestWeights.offer


class Seen(Callback):
    """The weights after every epoch, by epoch; dies when the validation of epoch `die_in` begins."""

    def __init__(self, die_in: int | None = None) -> None:
        self.die_in = die_in
        self.weights: dict[int, dict[str, Tensor]] = {}

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.die_in:
            raise MemoryError

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.weights[trainer.global_step // STEPS - 1] = weights_of(pl_module.model)


def fit(tmp_path: Path, run: Path | None = None, seen: Seen | None = None, **options: Any) -> tuple[Any, Seen]:
    scope = FullRetraining(name=save_tiny("llama", tmp_path), epochs=EPOCHS, **options)
    seen = seen or Seen()
    saving = [] if run is None else [Checkpoints(run / "checkpoints", every_n_steps=STEPS)]
    trainer = trainer_of(MaskEnforcer(), seen, *saving, default_root_dir=tmp_path, enable_checkpointing=run is not None)
    last = None if run is None else checkpoints.last(run / "checkpoints")
    trainer.fit(prepared(scope, directory=run), ckpt_path=last, weights_only=True)
    return scope, seen


@pytest.mark.parametrize("parameters", ["all", "lora"])
def test_the_result_is_the_best_epoch_or_if_asked_the_last(parameters: Any, tmp_path: Path) -> None:
    scope, seen = fit(tmp_path, parameters=parameters)
    last, _ = fit(tmp_path, parameters=parameters, keep_best=False)
    assert len(seen.weights) == EPOCHS
    if parameters == "all":
        assert same(weights_of(scope.model), seen.weights[BEST])
        assert same(weights_of(last.model), seen.weights[EPOCHS - 1])
    assert not same(weights_of(scope.model), weights_of(last.model))
    scope.masks.check(scope.model)
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_last_step_as_the_best_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held_out(monkeypatch, lambda epoch: -epoch)
    scope, _ = fit(tmp_path)
    last, _ = fit(tmp_path, keep_best=False)
    assert same(weights_of(scope.model), weights_of(last.model))


@pytest.mark.parametrize("epoch", [BEST, BEST + 1, EPOCHS - 1])
def test_a_run_killed_before_a_validation_ends_bit_identically(epoch: int, tmp_path: Path) -> None:
    straight, seen = fit(tmp_path, tmp_path / "straight")
    run = tmp_path / "killed"
    with pytest.raises(MemoryError):
        fit(tmp_path, run, Seen(die_in=epoch))
    assert checkpoints.step_of(checkpoints.last(run / "checkpoints") or run) == (epoch + 1) * STEPS
    resumed, rest = fit(tmp_path, run)
    assert list(rest.weights) == list(range(epoch, EPOCHS))
    assert same(rest.weights[epoch], seen.weights[epoch])
    assert same(weights_of(resumed.model), weights_of(straight.model))
    assert (run / "best.safetensors").exists()


def test_another_fit_does_not_take_the_file_of_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    fit(tmp_path, run)
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    held_out(monkeypatch, lambda epoch: 10 + epoch)
    scope, seen = fit(tmp_path, run)
    assert same(weights_of(scope.model), seen.weights[0])


def test_gradients_of_a_fused_optimizer_are_clipped(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(FullRetraining, "_steps_fused", True)
    name = save_tiny("llama", tmp_path)
    scope = prepared(FullRetraining(name=name, epochs=1))
    trainer_of(MaskEnforcer(), precision="bf16-mixed", gradient_clip_val=1.0).fit(scope)
    scope.masks.check(scope.model)
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    for fused, weight in zip((False, True), weights, strict=True):
        weight.grad = torch.tensor([1.0, -2.0, 0.0])
        optimizer = adamw([weight], fused, lr=0.1, weight_decay=0.5)
        assert optimizer.defaults["fused"] is (True if fused else None)
        optimizer.step()
    torch.testing.assert_close(*weights, rtol=1e-6, atol=0)
