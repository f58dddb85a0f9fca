"""Options that choose themselves: learning rates of windows, their starts, and the rate of the full model."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recon.distributed.part import Share
from recon.models.anatomy import Anatomy
from recon.models.windows import Windows
from recon.pruning.criteria import Wanda
from recon.pruning.interleaved import Interleaved
from recon.pruning.masks import Masks
from recon.pruning.patterns import Unstructured
from recon.scopes import BlockDistillation, FullRetraining, MatrixReconstruction, SubmoduleDistillation
from recon.scopes.distillation import Distillation
from recon.scopes.local import rate_search
from recon.scopes.local.rate_search import SHARE, Budget, Choice, search
from tests.support.families import tiny
from tests.support.scope_fixtures import IGNORED, data_of, prepared, same, save_tiny, trainer_of, untimed, weights_of

pytestmark = [pytest.mark.filterwarnings(one) for one in IGNORED]

BUDGET = Budget(trials=6, steps=4, in_fit=4)
GROUPS = Windows([["*.q_proj", "*.k_proj", "*.v_proj"], ["*.o_proj"], ["*.mlp.*"]])
SMALL: dict[str, Any] = {"epochs": 2, "batch_size": 4}

KINDS: dict[str, Callable[..., Distillation]] = {
    "submodule": lambda **o: SubmoduleDistillation(**SMALL | o),
    "recovered": lambda **o: SubmoduleDistillation(propagation="recovered", **SMALL | o),
    "groups": lambda **o: SubmoduleDistillation(windows=GROUPS, **SMALL | o),
    "overlap": lambda **o: BlockDistillation(num_blocks=2, stride=1, **SMALL | o),
    "lora": lambda **o: BlockDistillation(parameters="lora", **SMALL | o),
    "on the host": lambda **o: BlockDistillation(offload="host", **SMALL | o),
    "on disk": lambda **o: SubmoduleDistillation(offload="disk", **SMALL | o),
}


def valley(lowest: float) -> Callable[[float], float]:
    """Errors with their minimum at a rate, that grow with the square of the logarithm, and diverge far above it."""
    return lambda lr: math.inf if lr > 10 * lowest else math.exp(0.1 * math.log(lr / lowest) ** 2)


@pytest.mark.parametrize("lowest", [4e-4, 1.7e-3, 4e-3, 2.5e-2])
def test_a_search_finds_the_bottom(lowest: float) -> None:
    choice = search(valley(lowest), 4e-3, BUDGET)
    assert choice.lr == pytest.approx(lowest, rel=0.01)
    assert list(choice.tried) == sorted(choice.tried)
    assert len(choice.tried) <= BUDGET.trials
    assert Choice.from_dict(json.loads(json.dumps(choice.as_dict()))) == choice


def test_the_grid_has_no_end_but_the_budget_has() -> None:
    for lowest, nearest in ((1e-9, 2.0**-5), (1e9, 2.0**4)):
        choice = search(valley(lowest), 1.0, BUDGET)
        assert len(choice.tried) == 6
        assert choice.lr == nearest


def test_rates_that_diverge_are_turned_away_from() -> None:
    choice = search(lambda lr: math.nan if lr > 1e-3 else 1 + lr, 4e-3, BUDGET)
    assert choice.lr <= 1e-3
    assert choice.tried[4e-3] == choice.tried[2e-3] == math.inf
    assert json.dumps(choice.as_dict(), allow_nan=False).count("null") == 2
    assert search(lambda lr: math.inf, 1.0, BUDGET).lr == 2.0**-5


def test_a_longer_schedule_has_a_higher_rate() -> None:
    short, long = (search(valley(4e-3), 4e-3, Budget(6, 4, in_fit)).lr for in_fit in (4, 64))
    assert long == pytest.approx(2 * short)


@pytest.mark.parametrize("of_step", [1, 4, 8])
@pytest.mark.parametrize(("blocks", "size"), [(6, 1), (8, 1), (32, 1), (32, 2), (80, 4)])
def test_a_search_takes_a_tenth_of_a_fit(blocks: int, size: int, of_step: int) -> None:
    steps, held_out, reach = 2 * 128 // of_step, 8, blocks // 2 + size
    budget = Budget.of(steps, float(blocks), size, reach, of_step, held_out)
    trial, walk = 3 * of_step * budget.steps + held_out, of_step * budget.steps + held_out
    assert budget.trials * size * trial + reach * walk <= SHARE * 3 * of_step * steps * blocks
    assert 3 <= budget.trials <= 6
    assert 1 <= budget.steps <= steps / 4


def test_a_rate_that_no_lower_one_bounds_stays_low() -> None:
    budget = Budget(trials=3, steps=4, in_fit=64)
    assert search(valley(1e-4), 4e-3, budget, before=1e9).lr == 1e-3
    assert search(valley(1e-4), 4e-3, budget, before=0.1).lr == 5e-4


class Searched(Exception):
    """The search has ended."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_leaves_no_trace(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scope = prepared(KINDS[kind](name=save_tiny("llama", tmp_path)), directory=tmp_path / "run")
    before, masks, choose = weights_of(scope.model), scope.masks.fingerprint(), scope._choose_rates

    def choose_only() -> None:
        schedule, calibration = scope.schedule, scope.calibration
        choose()
        assert (scope.schedule, scope.calibration) == (schedule, calibration)
        assert not scope.schedule.begun
        raise Searched

    monkeypatch.setattr(scope, "_choose_rates", choose_only)
    with pytest.raises(Searched):
        trainer_of().fit(scope)
    assert scope.masks.fingerprint() == masks
    if kind != "on disk":
        assert same(weights_of(scope.model), before)
    assert not any(parameter.requires_grad for parameter in scope.model.parameters())
    assert not scope._optimizer().state
    assert scope.rates.keys() == {window.kind for window in scope.windows}
    for choice in scope.choices.values():
        assert len(set(choice.tried.values())) == len(choice.tried) >= 3  # each trial learned something else


def test_masks_chosen_for_a_search_are_forgotten(tmp_path: Path) -> None:
    scope = KINDS["recovered"](name=save_tiny("llama", tmp_path), epochs=1)
    scope.load(data_of())
    chooser = Interleaved(Wanda(), [Unstructured(0.5)] * 3, Anatomy.of(scope.model).prunable(), tmp_path / "masks")
    scope.prepare(data_of(), Masks({}), interleaved=chooser)
    trainer_of().fit(scope)
    written = {path.stem: Masks.load(path) for path in (tmp_path / "masks").glob("*.safetensors")}
    assert sorted(written) == ["000", "001", "002"]
    assert all(torch.equal(scope.masks[name], keep) for masks in written.values() for name, keep in masks.items())


@pytest.mark.parametrize("kind", ["submodule", "recovered"])
def test_a_killed_run_ends_bit_identically(kind: str, tmp_path: Path) -> None:
    name = save_tiny("llama", tmp_path)
    whole = prepared(KINDS[kind](name=name), directory=tmp_path / "whole")
    trainer_of().fit(whole)
    broken = prepared(KINDS[kind](name=name), directory=tmp_path / "broken")
    step = broken.training_step

    def killed(batch: Any, batch_idx: int) -> Any:
        if len(broken.results) == 3:
            raise Searched
        return step(batch, batch_idx)

    broken.training_step = killed
    with pytest.raises(Searched):
        trainer_of().fit(broken)
    again = prepared(KINDS[kind](name=name), directory=tmp_path / "broken")
    again._choose_rates = lambda: pytest.fail("the rates are in the run directory")
    trainer_of().fit(again)
    assert same(weights_of(again.model), weights_of(whole.model))
    assert untimed(again.results) == untimed(whole.results)
    assert again.rates == whole.rates == json.loads((tmp_path / "whole" / "rates.json").read_text())


def test_every_process_makes_the_same_choice(tmp_path: Path) -> None:
    name = save_tiny("llama", tmp_path)
    rates, ends = [], {}
    for index in (0, 1):
        scope = KINDS["submodule"](name=name)
        scope.divide(Share(index, 2), assembles=False)
        prepared(scope, directory=tmp_path / str(index))
        trainer_of().fit(scope)
        rates.append(scope.rates)
        ends |= {window.name: scope.results[window.name]["after"] for window in scope.own_windows}
    whole = prepared(KINDS["submodule"](name=name))
    trainer_of().fit(whole)
    assert rates == [whole.rates] * 2
    assert ends == {window: result["after"] for window, result in whole.results.items()}


def test_a_model_on_which_rates_diverge_is_recovered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recon.scopes.distillation.FIRST_TIMES_WIDTH", 1e39)
    monkeypatch.setattr(rate_search, "FACTOR", 1e21)
    scope = prepared(KINDS["submodule"](name=save_tiny("llama", tmp_path)), data_of(num=32))
    trainer_of().fit(scope)
    assert all(rate["tried"][-1]["error"] is None for rate in scope.rates.values())
    assert all(result["after"] <= result["before"] for result in scope.results.values())


def fit_from(start: str, name: str, num: int) -> Distillation:
    scope = prepared(KINDS["submodule"](name=name, start=start, lr=1e-3, epochs=1), data_of(num=num))
    trainer_of().fit(scope)
    return scope


@pytest.mark.parametrize("num", [1, 32])
def test_a_window_starts_from_the_lower_error(num: int, tmp_path: Path, caplog: Any) -> None:
    name = save_tiny("llama", tmp_path)
    with caplog.at_level(logging.WARNING, "recon"):
        auto = fit_from("auto", name, num)
    pruned, exact = (fit_from(start, name, num).results for start in ("pruned", "exact"))
    starts = {window: result["start"] for window, result in auto.results.items()}
    for window, result in auto.results.items():
        errors = {"pruned": pruned[window]["before"], "exact": exact[window]["before"]}
        assert result["before"] == min(errors.values()) == errors[starts[window]]
        assert ("starts from its pruned weights" in caplog.text) == ("pruned" in starts.values())
    assert ("more calibration tokens than a matrix has inputs" in caplog.text) == (num == 1)
    assert ("pruned" if num == 1 else "exact") in starts.values()


def test_starts_are_compared_in_windows_alone() -> None:
    with pytest.raises(ValueError, match=r"model\.start: auto compares"):
        FullRetraining(start="auto")
    with pytest.raises(ValueError, match=r"model\.start: exact is what the matrix scope ends at"):
        MatrixReconstruction(start="auto")


@pytest.mark.parametrize(("loss", "times"), [("cross_entropy", 0.25), ("distillation", 0.5)])
def test_full_retraining_goes_by_the_width(loss: Any, times: float, tmp_path: Path) -> None:
    scope = prepared(FullRetraining(name=save_tiny("gpt2", tmp_path), loss=loss, epochs=1))
    trainer_of().fit(scope)
    assert scope.lr == times / tiny("gpt2").config.hidden_size
