"""Fits that are killed, told to stop, or overtaken by another process."""

import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from recon.basics.manifest import Entry, Manifest
from tests.support.families import DEPTH
from tests.support.scope_fixtures import (
    IGNORED,
    prepared,
    random_masks,
    same,
    save_tiny,
    untimed,
)
from tests.support.scope_runs import (
    BATCHES,
    EPOCHS,
    LOCAL,
    RESUMED,
    SCOPES,
    STEPS,
    WINDOWS,
    Kill,
    Killed,
    Spy,
    fit,
)

pytestmark = [pytest.mark.filterwarnings("error"), *(pytest.mark.filterwarnings(one) for one in (*IGNORED, RESUMED))]


@pytest.mark.parametrize(
    ("kind", "family", "window", "step"),
    [
        ("matrix", "gpt2", "001", 1),
        ("submodule", "llama", "000.attention", 1),
        ("submodule", "llama", "000.mlp", 1),
        ("submodule", "phi", "001.mlp", 4),
        ("submodule", "gpt2", "002.mlp", 6),
        ("block", "llama", "001", 5),
        ("two blocks", "gpt2", "002", 2),
    ],
)
def test_a_killed_run_goes_on_and_ends_bit_identically(
    kind: str, family: str, window: str, step: int, tmp_path: Path
) -> None:
    name = save_tiny(family, tmp_path)
    straight = prepared(LOCAL[kind](name=name))
    expected = fit(straight)
    with pytest.raises(Killed):
        fit(prepared(LOCAL[kind](name=name), directory=tmp_path), Kill(window, step))
    finished = WINDOWS[kind].index(window)
    files = sorted((tmp_path / "windows").glob("*")) if finished else []
    assert [file.name for file in files] == [f"{one}.safetensors" for one in WINDOWS[kind][:finished]]
    again, spy = prepared(LOCAL[kind](name=name), directory=tmp_path), Spy()
    assert same(fit(again, spy), expected)
    assert list(dict.fromkeys(spy.windows)) == WINDOWS[kind][finished:]
    assert len(spy.windows) == (len(WINDOWS[kind]) - finished) * (1 if kind == "matrix" else EPOCHS * BATCHES)
    assert untimed(again.results) == untimed(straight.results)
    assert list(again.results) == WINDOWS[kind]


def test_only_missing_windows_are_trained_again(tmp_path: Path) -> None:
    name = save_tiny("llama", tmp_path)
    expected = fit(prepared(LOCAL["submodule"](name=name), directory=tmp_path))
    for missing in (["001.attention"], ["000.attention", "001.mlp"], ["002.mlp"], []):
        for one in missing:
            (tmp_path / "windows" / f"{one}.safetensors").unlink()
        again, spy = prepared(LOCAL["submodule"](name=name), directory=tmp_path), Spy()
        assert same(fit(again, spy), expected)
        assert spy.windows == [one for one in missing for _ in range(EPOCHS * BATCHES)]
        assert list(again.results) == WINDOWS["submodule"]


class Overtake(Callback):
    """Puts the windows of another process into the run directory in the middle of a window."""

    def __init__(self, window: str, theirs: Path, ours: Path) -> None:
        self.window, self.theirs, self.ours = window, theirs, ours

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        if pl_module.window.name == self.window:
            for file in self.theirs.glob("*"):
                if not (self.ours / file.name).exists():
                    copied = Path(shutil.copy(file, self.ours / file.name))
                    Manifest(self.ours.parent).record({copied: Entry.of(copied)})


@pytest.mark.parametrize(("kind", "at"), [("matrix", "001"), ("submodule", "000.attention"), ("block", "002")])
def test_a_window_that_another_process_has_written_is_taken_and_not_written_again(
    kind: str, at: str, tmp_path: Path
) -> None:
    name, theirs, ours = save_tiny("llama", tmp_path), tmp_path / "theirs", tmp_path / "ours"
    fit(prepared(LOCAL[kind](name=name), directory=theirs))
    for file in (theirs / "windows").iterdir():  # other weights than those that this process would make
        weights = {one: weight * 1.5 for one, weight in load_file(file).items()}
        with safe_open(file, "pt") as opened:
            save_file(weights, file, opened.metadata())
    (ours / "windows").mkdir(parents=True)
    overtaken, spy = prepared(LOCAL[kind](name=name), directory=ours), Spy()
    weights = fit(overtaken, spy, Overtake(at, theirs / "windows", ours / "windows"))
    first = WINDOWS[kind].index(at)
    assert list(dict.fromkeys(spy.windows)) == WINDOWS[kind][: first + 1]
    for window in WINDOWS[kind][first:]:
        mine, other = (one / "windows" / f"{window}.safetensors" for one in (ours, theirs))
        assert mine.read_bytes() == other.read_bytes()
        assert all(torch.equal(weights[one], weight) for one, weight in load_file(mine).items())
    assert list(overtaken.results) == WINDOWS[kind]


@pytest.mark.parametrize("stop_after", [15, 17, 18])
def test_a_fit_that_was_told_to_stop_early_writes_no_half_trained_window(stop_after: int, tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == stop_after

    name = save_tiny("llama", tmp_path)
    expected = fit(prepared(LOCAL["submodule"](name=name)))
    with pytest.raises(RuntimeError, match=r"stopped before the end of 00[01]"):
        fit(prepared(LOCAL["submodule"](name=name), directory=tmp_path), Stop())
    again, spy = prepared(LOCAL["submodule"](name=name), directory=tmp_path), Spy()
    assert same(fit(again, spy), expected)
    assert len(spy.windows) == (2 * DEPTH - stop_after // STEPS) * STEPS


def test_max_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trainer\.max_steps=7"):
        fit(prepared(LOCAL["block"](name=save_tiny("llama", tmp_path))), max_steps=7)


def test_windows_of_other_masks_are_refused_in_the_end(tmp_path: Path) -> None:
    name = save_tiny("llama", tmp_path)
    first = prepared(LOCAL["block"](name=name), directory=tmp_path)
    fit(first)
    other = random_masks(first.model, seed=1)
    with pytest.raises(ValueError, match=r"`model\.layers\.0\.self_attn\.q_proj\.weight`"):
        fit(prepared(LOCAL["block"](name=name), directory=tmp_path, masks=other))


@pytest.mark.parametrize("kind", ["full", "full distillation"])
def test_full_retraining_resumes_bit_identically_at_an_epochs_end(kind: str, tmp_path: Path) -> None:
    name = save_tiny("llama", tmp_path)

    def run(*callbacks: Callback, **options: Any) -> dict[str, Tensor]:
        saver = ModelCheckpoint(tmp_path / "checkpoints", filename="{epoch}", save_top_k=-1)
        scope = prepared(SCOPES[kind](name=name, epochs=4))
        return fit(scope, saver, *callbacks, enable_checkpointing=True, **options)

    expected = run()
    for epoch, steps in ((1, 2 * BATCHES), (3, 0)):
        spy = Spy()
        checkpoint = tmp_path / "checkpoints" / f"epoch={epoch}.ckpt"
        assert same(run(spy, ckpt_path=checkpoint), expected)
        assert len(spy.rates) == steps
