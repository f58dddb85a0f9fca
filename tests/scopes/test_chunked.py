"""Losses in chunks of tokens: loss and gradients of whole logits, for heads that can be cut."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from callbacks import MaskEnforcer
from recon.models.loading import ModelSource
from recon.scopes import FullRetraining
from recon.scopes.chunked import mean_over_chunks
from recon.scopes.heads import objection_to_chunks
from recon.scopes.model_loss import model_loss
from tests.support.distributed_runs import difference
from tests.support.families import VOCABULARY, tiny, token_ids
from tests.support.scope_fixtures import IGNORED, prepared, save_tiny, trainer_of, weights_of

pytestmark = [pytest.mark.filterwarnings(one) for one in ("error", *IGNORED)]

LOSSES = ("cross_entropy", "distillation")


def gradients(family: str, loss: Any, rows: int | None, half: bool, trained: str = "") -> dict[str, Tensor]:
    """The loss and the gradients of parameters whose names have `trained` in them."""
    student, teacher = tiny(family), tiny(family)
    for name, parameter in student.named_parameters():
        parameter.data.mul_(1.5)
        parameter.requires_grad_(trained in name)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        value = model_loss(student, token_ids(3, 9), loss, teacher.requires_grad_(False), 2.0, rows)
    (3 * value).backward()
    found = {name: one.grad for name, one in student.named_parameters() if one.grad is not None}
    return {"loss": value.detach(), **found}


# Plain, with a bias, tied to the embeddings.
@pytest.mark.parametrize("family", ["llama", "gptj", "gpt2"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_loss_and_gradients_are_those_of_whole_logits(family: str, loss: str, rows: int) -> None:
    whole, chunked = (gradients(family, loss, one, half=False) for one in (None, rows))
    assert whole.keys() == chunked.keys()
    for name, expected in whole.items():
        error = (chunked[name] - expected).norm() / expected.norm()
        assert error < 2e-6, name


@pytest.mark.parametrize("loss", LOSSES)
def test_a_frozen_head_and_autocast_change_nothing_beyond_rounding(loss: str) -> None:
    whole, chunked = (gradients("gptj", loss, one, half=True, trained=".h.") for one in (None, 7))
    exact = gradients("gptj", loss, None, half=False, trained=".h.")
    assert whole.keys() == chunked.keys() == exact.keys()
    assert "lm_head.weight" not in chunked
    for name, expected in exact.items():
        errors = [float((one[name] - expected).norm() / expected.norm()) for one in (whole, chunked)]
        assert errors[1] < max(1.5 * errors[0], 1e-3), name


def test_gradients_of_chunks_are_the_same_each_time_and_taken_once() -> None:
    first, second = (gradients("llama", "distillation", 4, half=False) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    hidden, weight = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3)
    loss = mean_over_chunks(hidden, weight, None, lambda logits, chunk: (logits.sum(), torch.ones_like(logits)), 2)
    torch.testing.assert_close(loss, (hidden @ weight.T).sum() / 5)
    loss.backward(retain_graph=True)
    torch.testing.assert_close(hidden.grad, weight.sum(0).expand(5, 3) / 5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("llama", None),
        ("phi", None),
        ("bloom", None),
        ("opt", None),
        ("gemma2", "not the output of its head alone"),  # a cap
        ("cohere", "not the output of its head alone"),  # a scale
    ],
)
def test_only_logits_that_are_the_heads_output_are_cut(family: str, said: str | None) -> None:
    found = objection_to_chunks(tiny(family), token_ids())
    assert found is None if said is None else said in (found or "")


def test_code_that_needs_the_whole_output_of_its_head_is_found() -> None:
    model = tiny("llama")
    plain = type(model).forward

    def sliced(*args: Any, **kwargs: Any) -> Any:
        output = plain(model, *args, **kwargs)
        output.logits = output.logits[..., :VOCABULARY]
        return output

    model.forward = sliced
    assert "needs the whole output" in (objection_to_chunks(model, token_ids()) or "")
    model.lm_head.forward = lambda hidden: hidden
    assert objection_to_chunks(model, token_ids()) == "its head is Linear, not a plain nn.Linear"


def fit(name: str, memory: str, **options: Any) -> tuple[FullRetraining, dict[str, Tensor]]:
    scope = prepared(FullRetraining(name=name, epochs=2, logits_memory=memory, **options))
    trainer_of(MaskEnforcer()).fit(scope)
    return scope, weights_of(scope.model)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_fit_in_chunks_ends_where_one_of_whole_logits_does(loss: Any, tmp_path: Path) -> None:
    name = save_tiny("llama", tmp_path)
    scope, whole = fit(name, "1GiB", loss=loss)
    assert scope._chunk_rows is None
    scope, chunked = fit(name, f"{10 * 4 * VOCABULARY}B", loss=loss)
    assert scope._chunk_rows == 10
    assert "forward" not in vars(scope.model.lm_head)
    assert difference(whole, chunked) < 1e-5


def test_a_capped_model_trains_on_whole_logits_and_says_why(tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, "recon"):
        scope, weights = fit(save_tiny("gemma2", tmp_path), "1KiB")
    assert "such as under a cap or a scale" in caplog.text
    assert scope._chunk_rows is None
    _, whole = fit(ModelSource(str(tmp_path / "dense-gemma2")).name, "1GiB")
    assert all(torch.equal(weights[one], whole[one]) for one in whole)
