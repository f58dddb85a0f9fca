"""The scopes through Lightning's own fit, on models of three kinds: sequential, Conv1D, parallel attention."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from transformers import PreTrainedModel

from callbacks import MaskEnforcer
from recon.models.anatomy import Anatomy
from recon.pruning.masks import Masks
from recon.scopes import (
    FullRetraining,
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
    weights_of,
)
from tests.support.scope_runs import (
    BATCHES,
    EPOCHS,
    LOCAL,
    RESUMED,
    SCOPES,
    STEPS,
    WINDOWS,
    Spy,
    assert_masks_exact,
    fit,
    pruned_of,
)

pytestmark = [pytest.mark.filterwarnings("error"), *(pytest.mark.filterwarnings(one) for one in (*IGNORED, RESUMED))]

FAMILIES = ("llama", "gpt2", "phi")


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
