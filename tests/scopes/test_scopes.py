"""The scopes through Lightning's own fit, on models of three kinds: sequential, Conv1D, parallel attention."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from callbacks import MaskEnforcer
from recon.basics.manifest import Entry, Manifest
from recon.models.anatomy import Anatomy
from recon.pruning.masks import Masks
from recon.scopes import (
    BlockDistillation,
    FullRetraining,
    MatrixReconstruction,
    Scope,
    SubmoduleDistillation,
)
from recon.scopes.local.module import LocalScope
from tests.support.families import DEPTH, tiny
from tests.support.references import masked_least_squares, relative_error
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

RESUMED = "ignore:Checkpoint directory .* exists and is not empty"
pytestmark = [pytest.mark.filterwarnings("error"), *(pytest.mark.filterwarnings(one) for one in (*IGNORED, RESUMED))]

FAMILIES = ("llama", "gpt2", "phi")
EPOCHS, BATCHES, STEPS = 2, 3, 6  # 10 sequences, 4 a batch
DISTILLED = {"epochs": EPOCHS, "lr": 3e-3, "batch_size": 4, "start": "pruned"}  # other starts: test_start.py
LOCAL: dict[str, Callable[..., LocalScope]] = {
    "matrix": lambda **o: MatrixReconstruction(batch_size=4, **o),
    "submodule": lambda **o: SubmoduleDistillation(**{**DISTILLED, **o}),
    "block": lambda **o: BlockDistillation(**{**DISTILLED, **o}),
    "two blocks": lambda **o: BlockDistillation(num_blocks=2, **{**DISTILLED, **o}),
}
SCOPES: dict[str, Callable[..., Scope]] = {
    **LOCAL,
    "full": lambda **o: FullRetraining(**{"epochs": EPOCHS, "lr": 3e-3, **o}),
    "full distillation": lambda **o: FullRetraining(loss="distillation", **{"epochs": EPOCHS, "lr": 3e-3, **o}),
}
BLOCK_NAMES = [f"{index:03d}" for index in range(DEPTH)]
WINDOWS = {
    "matrix": BLOCK_NAMES,
    "submodule": [f"{block}.{part}" for block in BLOCK_NAMES for part in ("attention", "mlp")],
    "block": BLOCK_NAMES,
    "two blocks": ["000-001", "002"],
}


class Spy(Callback):
    """Notes what a fit does, step by step."""

    def __init__(self) -> None:
        self.windows: list[str] = []
        self.learning: list[set[str]] = []
        self.rates: list[float] = []
        self.seen: list[Tensor] = []
        self.num_states: list[int] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Scope)
        self.learning.append({name for name, p in pl_module.model.named_parameters() if p.requires_grad})
        if isinstance(pl_module, LocalScope):
            assert pl_module.window is not None
            self.windows.append(pl_module.window.name)
        if isinstance(batch, dict):
            self.seen.append(next(iter(batch.values())).detach().clone())
        if trainer.optimizers:
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.optimizers:
            self.num_states.append(len(trainer.optimizers[0].state))


class Killed(Exception):
    pass


class Kill(Callback):
    """Ends a fit at a step of a window."""

    def __init__(self, window: str, step: int) -> None:
        self.window, self.steps_left = window, step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps_left -= pl_module.window.name == self.window
        if self.steps_left == 0:
            raise Killed


def fit(scope: Scope, *callbacks: Callback, ckpt_path: Any = None, **options: Any) -> dict[str, Tensor]:
    """Fit with masks enforced; return the weights."""
    trainer = trainer_of(MaskEnforcer(), *callbacks, **options)
    trainer.fit(scope, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return weights_of(scope.model)


def pruned_of(model: PreTrainedModel, masks: Masks) -> PreTrainedModel:
    with torch.no_grad():
        for name, keep in masks.items():
            model.get_parameter(name).masked_fill_(~keep, 0)
    return model


def assert_masks_exact(weights: dict[str, Tensor], masks: Masks) -> None:
    for name, keep in masks.items():
        assert int((weights[name][~keep] != 0).sum()) == 0, name
        assert int((weights[name][keep] == 0).sum()) == 0, name


# --- what every scope does ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", LOCAL)
def test_a_local_scope_improves_every_window_within_its_masks(kind: str, family: str, tmp_path: Path) -> None:
    scope, spy = prepared(LOCAL[kind](name=save_tiny(family, tmp_path))), Spy()
    dense, masks = weights_of(scope.model), scope.masks
    weights = fit(scope, spy)
    assert_masks_exact(weights, masks)
    assert list(scope.results) == WINDOWS[kind]
    steps = 1 if kind == "matrix" else EPOCHS * BATCHES
    assert spy.windows == [name for name in WINDOWS[kind] for _ in range(steps)]
    for name, result in scope.results.items():
        assert 0 < result["after"] < result["before"], name
    owned = {name for window in scope.windows for name in window.owned}
    outside = [name for name in dense if name not in owned]
    assert any("embed" in name or "wte" in name for name in outside)
    assert all(torch.equal(weights[name], dense[name]) for name in outside)
    moved = {name for name in dense if not torch.equal(weights[name], dense[name])}
    assert moved == (set(masks) if kind == "matrix" else owned)
    if (kind, family) == ("submodule", "phi"):
        assert [name for name in outside if "input_layernorm" in name]
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in scope.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["full", "full distillation"])
def test_full_retraining_lowers_the_held_out_loss_within_its_masks(kind: str, family: str, tmp_path: Path) -> None:
    scope = prepared(SCOPES[kind](name=save_tiny(family, tmp_path), epochs=3))
    dense, teacher = weights_of(tiny(family)), tiny(family)
    tokens = scope.data.tokens("validation")

    def held_out_loss() -> float:
        with torch.no_grad():
            log_p = scope.model(tokens).logits[:, :-1].log_softmax(-1)
            if kind == "full":
                return -log_p.gather(2, tokens[:, 1:, None]).mean().item()
            log_q = teacher(tokens).logits[:, :-1].log_softmax(-1)
            return (log_q.exp() * (log_q - log_p)).sum(-1).mean().item()

    before = held_out_loss()
    trainer = trainer_of(MaskEnforcer())
    trainer.fit(scope)
    weights = weights_of(scope.model)
    assert_masks_exact(weights, scope.masks)
    assert held_out_loss() < before
    assert trainer.callback_metrics["held_out_loss"].item() == pytest.approx(held_out_loss(), rel=1e-5)
    in_blocks = {name for block in Anatomy.of(scope.model).blocks for name in block.parameters()}
    moved = {name for name in dense if not torch.equal(weights[name], dense[name])}
    # A key's bias moves no attention weight, so its gradient is rounding at most.
    assert moved <= in_blocks
    assert in_blocks - moved <= {name for name in in_blocks if "k_proj.bias" in name}


def test_full_retraining_of_everything_moves_the_embeddings_too(tmp_path: Path) -> None:
    scope = prepared(FullRetraining(name=save_tiny("llama", tmp_path), epochs=1, train="all"))
    dense = weights_of(tiny("llama"))
    weights = fit(scope)
    assert not any(torch.equal(weights[name], dense[name]) for name in dense)
    assert_masks_exact(weights, scope.masks)


def test_distillation_from_oneself_has_nothing_to_learn(tmp_path: Path) -> None:
    # A learning rate of almost 0, for Adam makes steps of the usual size out of gradients that are rounding.
    scope = SCOPES["full distillation"](name=save_tiny("llama", tmp_path), lr=1e-12)
    trainer = trainer_of()
    trainer.fit(prepared(scope, masks=Masks({})))
    assert trainer.callback_metrics["held_out_loss"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_matrix_ends_at_the_optimum_of_dense_least_squares(family: str, tmp_path: Path) -> None:
    dense_model, seen = tiny(family), {}
    matrices = Anatomy.of(dense_model).prunable()
    for name, matrix in matrices.items():
        matrix.module.register_forward_pre_hook(
            lambda module, args, name=name: seen.__setitem__(name, args[0].detach())
        )
    data = data_of(num=30)
    with torch.no_grad():
        dense_model(data.tokens("train"), use_cache=False)
    scope = prepared(LOCAL["matrix"](name=save_tiny(family, tmp_path)), data)
    weights = fit(scope)
    reported = {name: one for result in scope.results.values() for name, one in result["matrices"].items()}
    assert reported.keys() == matrices.keys()
    for name, matrix in matrices.items():
        dense, found, keep = matrix.weight, matrix.out_in(weights[name]), matrix.out_in(scope.masks[name])
        optimum = relative_error(masked_least_squares(dense, seen[name], keep), dense, seen[name])
        error = relative_error(found, dense, seen[name])
        assert error == pytest.approx(optimum, rel=1e-3), name
        assert reported[name]["relative_error"] == pytest.approx(optimum, rel=1e-3), name


def test_the_held_out_error_is_that_of_the_windows_output_on_validation_tokens(tmp_path: Path) -> None:
    scope = prepared(LOCAL["two blocks"](name=save_tiny("llama", tmp_path)))
    fit(scope)

    def states(model: PreTrainedModel) -> Any:
        with torch.no_grad():
            return model(scope.data.tokens("validation"), output_hidden_states=True).hidden_states

    dense = states(tiny("llama"))[2]
    for model, key in ((pruned_of(tiny("llama"), scope.masks), "before"), (scope.model, "after")):
        error = (states(model)[2] - dense).square().sum() / dense.square().sum()
        assert scope.results["000-001"][key] == pytest.approx(error.item(), rel=1e-4)


# --- training: data, schedule, memory -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["submodule", "block", "two blocks"])
def test_only_the_current_window_learns_and_has_optimizer_state(kind: str, tmp_path: Path) -> None:
    scope, spy = prepared(LOCAL[kind](name=save_tiny("phi", tmp_path))), Spy()
    trainer = trainer_of(MaskEnforcer(), spy)
    trainer.fit(scope)
    owned = {window.name: set(window.owned) for window in scope.windows}
    assert spy.learning == [owned[name] for name in spy.windows]
    assert spy.num_states == [len(owned[name]) for name in spy.windows]
    assert len(trainer.optimizers[0].state) == 0
    assert not hasattr(scope, "calibration")


@pytest.mark.parametrize("kind", ["submodule", "full"])
def test_every_sequence_is_seen_once_an_epoch_in_another_order(kind: str, tmp_path: Path) -> None:
    scope, spy = prepared(SCOPES[kind](name=save_tiny("llama", tmp_path))), Spy()
    fit(scope, spy)
    rows = [batch.flatten(1) for batch in spy.seen[: 2 * BATCHES]]
    assert [len(batch) for batch in rows] == [4, 4, 2, 4, 4, 2]
    first, second = torch.cat(rows[:BATCHES]), torch.cat(rows[BATCHES:])
    assert not torch.equal(first, second)
    assert torch.equal(*(one[one[:, :3].double().sum(1).argsort()] for one in (first, second)))
    if kind == "full":
        expected = scope.data.tokens("train")
        assert torch.equal(first.unique(dim=0), expected.unique(dim=0))
    assert scope.train_tokens == 10 * 16 * EPOCHS


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_learning_rate_starts_anew_with_every_window(accumulate: int, tmp_path: Path) -> None:
    scope = prepared(LOCAL["submodule"](name=save_tiny("llama", tmp_path), warmup=0.5), directory=tmp_path)
    spy = Spy()
    weights = fit(scope, spy, accumulate_grad_batches=accumulate)
    per_window = [spy.rates[start : start + STEPS] for start in range(0, len(spy.rates), STEPS)]
    assert len(per_window) == 2 * DEPTH
    for rates in per_window:  # a last batch of an epoch steps by itself
        assert rates == pytest.approx(
            [1e-3, 2e-3, 3e-3, 3e-3, 2e-3, 1e-3] if accumulate == 1 else [1.5e-3, 1.5e-3, 3e-3, 3e-3, 3e-3, 1.5e-3]
        )
    (tmp_path / "windows" / "001.mlp.safetensors").unlink()
    again, spy = prepared(LOCAL["submodule"](name=save_tiny("llama", tmp_path), warmup=0.5), directory=tmp_path), Spy()
    assert same(fit(again, spy, accumulate_grad_batches=accumulate), weights)
    assert spy.rates == pytest.approx(per_window[0])


@pytest.mark.parametrize("kind", ["block", "full"])
def test_the_trainers_gradient_clipping_applies(kind: str, tmp_path: Path) -> None:
    class Norms(Callback):
        largest = 0.0

        def on_before_zero_grad(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            gradients = [p.grad.norm() for p in pl_module.model.parameters() if p.grad is not None]
            if gradients:
                self.largest = max(self.largest, torch.stack(gradients).norm().item())

    scope, norms = prepared(SCOPES[kind](name=save_tiny("llama", tmp_path))), Norms()
    weights = fit(scope, norms, gradient_clip_val=1e-2)
    assert norms.largest == pytest.approx(1e-2, rel=1e-3)
    assert_masks_exact(weights, scope.masks)


@pytest.mark.parametrize("kind", ["matrix", "submodule", "full"])
def test_one_seed_gives_one_result_and_another_seed_another(kind: str, tmp_path: Path) -> None:
    name = save_tiny("llama", tmp_path)

    def run(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed + 123)  # global state must not matter
        return fit(prepared(SCOPES[kind](name=name), data_of(seed=seed)))

    first = run(0)
    torch.rand(7)
    assert same(first, run(0))
    assert same(first, run(1)) == (kind == "matrix")  # solved exactly: no order of the data


@pytest.mark.parametrize("kind", ["block", "full distillation"])
def test_dropout_stays_off(kind: str, tmp_path: Path) -> None:
    dropouts = {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}
    with_dropout = fit(prepared(SCOPES[kind](name=save_tiny("gpt2", tmp_path / "with", **dropouts))))
    none = dict.fromkeys(dropouts, 0.0)
    assert same(with_dropout, fit(prepared(SCOPES[kind](name=save_tiny("gpt2", tmp_path / "without", **none)))))


# --- masks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["submodule", "full"])
def test_a_scope_that_attaches_no_enforcer_refuses_its_result(
    kind: str, weight_decay: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = save_tiny("llama", tmp_path)
    scope = prepared(SCOPES[kind](name=name, weight_decay=weight_decay), directory=tmp_path)
    monkeypatch.setattr(scope, "configure_callbacks", list)
    with pytest.raises(ValueError, match=r"`model\.layers\.0\.self_attn\.q_proj\.weight`"):
        trainer_of().fit(scope)
    assert not (tmp_path / "windows").exists()
    if weight_decay:
        scope = prepared(SCOPES[kind](name=name, weight_decay=weight_decay))
        assert_masks_exact(fit(scope), scope.masks)


def test_weight_decay_shrinks_what_survives(tmp_path: Path) -> None:
    name = save_tiny("llama", tmp_path)
    plain, decayed = (fit(prepared(LOCAL["block"](name=name, weight_decay=decay))) for decay in (0.0, 10.0))
    weight = "model.layers.0.mlp.up_proj.weight"
    assert decayed[weight].norm() < 0.97 * plain[weight].norm()


@pytest.mark.parametrize("kind", ["matrix", "submodule", "block"])
def test_a_window_without_pruned_weights_stays_dense(kind: str, tmp_path: Path) -> None:
    scope, spy = LOCAL[kind](name=save_tiny("llama", tmp_path)), Spy()
    scope.load(data := data_of())
    dense = weights_of(scope.model)
    masks = random_masks(scope.model, exclude=("model.layers.0.*", "model.layers.1.*", "model.layers.2.mlp.*"))
    all_kept = torch.ones_like(dense["model.layers.0.mlp.up_proj.weight"], dtype=torch.bool)
    scope.prepare(data, Masks({**masks, "model.layers.0.mlp.up_proj.weight": all_kept}))
    weights = fit(scope, spy)
    (recovered,) = scope.results
    assert recovered == {"submodule": "002.attention"}.get(kind, "002")
    assert scope.results[recovered]["after"] < scope.results[recovered]["before"]
    assert len(set(spy.windows)) == 1
    early = [name for name in dense if "layers.0" in name or "layers.1" in name]
    assert early
    assert all(torch.equal(weights[name], dense[name]) for name in early)
    if kind == "submodule":
        alone = prepared(LOCAL[kind](name=save_tiny("llama", tmp_path)), masks=masks)
        assert same(fit(alone), weights)


@pytest.mark.parametrize("kind", LOCAL)
def test_nothing_pruned_is_nothing_to_do(kind: str, tmp_path: Path) -> None:
    scope, spy = prepared(LOCAL[kind](name=save_tiny("llama", tmp_path)), masks=Masks({})), Spy()
    dense = weights_of(scope.model)
    assert same(fit(scope, spy), dense)
    assert (spy.windows, scope.results) == ([], {})


def test_a_mask_that_no_window_owns_is_refused(tmp_path: Path) -> None:
    scope = LOCAL["submodule"](name=save_tiny("llama", tmp_path))
    scope.load(data := data_of())
    embedding = scope.model.get_parameter("model.embed_tokens.weight")
    with pytest.raises(ValueError, match=r"belong to none, model\.embed_tokens\.weight the first"):
        scope.prepare(data, Masks({"model.embed_tokens.weight": torch.rand(embedding.shape) < 0.5}))


@pytest.mark.parametrize("kind", ["block", "full"])
def test_masks_of_another_model_are_refused(kind: str, tmp_path: Path) -> None:
    scope = SCOPES[kind](name=save_tiny("llama", tmp_path))
    scope.load(data := data_of())
    with pytest.raises(ValueError, match="names of the model's parameters"):
        scope.prepare(data, random_masks(tiny("gpt2")))


@pytest.mark.parametrize("kind", ["submodule", "full"])
def test_masks_are_exact_in_bf16_mixed_precision(kind: str, tmp_path: Path) -> None:
    name = save_tiny("llama", tmp_path)
    scope = prepared(SCOPES[kind](name=name))
    weights = fit(scope, precision="bf16-mixed")
    assert_masks_exact(weights, scope.masks)
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert not same(weights, fit(prepared(SCOPES[kind](name=name))))  # autocast did take part
    if isinstance(scope, LocalScope):
        assert all(result["after"] < result["before"] for result in scope.results.values())


# --- going on after a kill ----------------------------------------------------------------------------


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


# --- numbers that are none ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("matrix", r"`model\.layers\.1\.mlp\.down_proj\.weight`|after block 1"),
        ("submodule", "after block 1 in the batch that begins with sequence 0"),
        ("block", "after block 1 in the batch that begins with sequence 0"),
        ("full", "full retraining, step 0, batch 0"),
    ],
)
def test_a_weight_that_is_no_number_stops_the_run(kind: str, where: str, tmp_path: Path) -> None:
    scope = prepared(SCOPES[kind](name=save_tiny("llama", tmp_path)))
    with torch.no_grad():
        weight = scope.model.get_parameter("model.layers.1.mlp.down_proj.weight")
        weight.masked_fill_(scope.masks["model.layers.1.mlp.down_proj.weight"], float("nan"))
    with pytest.raises((FloatingPointError, ValueError), match=where):
        fit(scope)


@pytest.mark.parametrize("kind", ["matrix", "submodule"])
def test_hidden_states_that_overflow_name_block_and_batch(kind: str, tmp_path: Path) -> None:
    scope = LOCAL[kind](name=save_tiny("gpt2", tmp_path))
    scope.load(data := data_of())
    data.tokens("train").masked_fill_(data.tokens("train") == 95, 94)
    data.tokens("validation").masked_fill_(data.tokens("validation") == 95, 94)
    data.tokens("train")[5, 3] = 95
    scope.prepare(data, random_masks(scope.model))
    with torch.no_grad():
        scope.model.get_parameter("transformer.wte.weight")[95] = 3e38  # LayerNorm squares it
    with pytest.raises((FloatingPointError, ValueError), match=r"begins with sequence 4|in batch 1 \(counted from 0\)"):
        fit(scope)


@pytest.mark.parametrize(
    ("kind", "where"),
    [("submodule", r"window 000\.attention, epoch 1, batch 1"), ("full", "full retraining, step 1, batch 1")],
)
def test_a_diverging_loss_names_window_and_batch(kind: str, where: str, tmp_path: Path) -> None:
    scope = prepared(SCOPES[kind](name=save_tiny("gpt2", tmp_path), lr=1e30), directory=tmp_path)
    with pytest.raises(FloatingPointError, match=where):
        fit(scope)
    assert not (tmp_path / "windows").exists()


def test_losses_are_looked_at_when_they_are_logged_and_at_an_epochs_end(tmp_path: Path) -> None:
    class Losses(Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []
            self.logged: dict[int, float] = {}

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
            self.seen.append(float(outputs["loss"]))

    class Lines(CSVLogger):
        def log_metrics(self, metrics: dict, step: int | None = None) -> None:  # type: ignore[override]
            if "loss" in metrics:
                assert step is not None
                losses.logged[step] = metrics["loss"]

    def fit_logged(**options: Any) -> None:
        scope = prepared(LOCAL["block"](name=name, epochs=1, batch_size=1, **options), directory=tmp_path)
        trainer = trainer_of(MaskEnforcer(), losses, log_every_n_steps=4)
        trainer.loggers = [Lines(tmp_path)]
        trainer.fit(scope)

    name, losses = save_tiny("gpt2", tmp_path), Losses()
    fit_logged()
    assert len(losses.seen) == 10 * DEPTH
    assert losses.logged == {step: losses.seen[step] for step in range(3, 10 * DEPTH, 4)}

    for file in (tmp_path / "windows").iterdir():
        file.unlink()
    losses = Losses()
    with pytest.raises(FloatingPointError, match=r"got nan in window 000, epoch 1, batch 1;"):
        fit_logged(lr=1e30)
    assert len(losses.seen) == 3  # the fourth is asked for all
    assert not any((tmp_path / "windows").iterdir())


@pytest.mark.parametrize(
    ("kind", "where"),
    [("block", "window 000, held-out batch that begins with sequence 0"), ("full", "held-out batch 0")],
)
def test_the_last_step_is_watched_too(kind: str, where: str, tmp_path: Path) -> None:
    data = data_of(num=4)  # one step
    scope = prepared(SCOPES[kind](name=save_tiny("gpt2", tmp_path), lr=1e30, epochs=1), data, tmp_path)
    with pytest.raises(FloatingPointError, match=where):
        fit(scope)
    assert not (tmp_path / "windows").exists()


@pytest.mark.parametrize(
    ("kind", "options", "option"),
    [
        ("submodule", {"epochs": 0}, "model.epochs"),
        ("matrix", {"batch_size": 0}, "model.batch_size"),
        ("block", {"num_blocks": 0}, "model.num_blocks"),
    ],
)
def test_options_out_of_range_are_named(kind: str, options: dict, option: str) -> None:
    classes = {"submodule": SubmoduleDistillation, "matrix": MatrixReconstruction, "block": BlockDistillation}
    with pytest.raises(ValueError, match=option):
        classes[kind](**options)
