"""Masks hold whatever callbacks a trainer has: the scope attaches what enforces them."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.loggers.logger import DummyLogger

import callbacks
from recon.scopes import BlockDistillation, FullRetraining, MatrixReconstruction, SubmoduleDistillation
from recon.scopes.enforcement import MaskEnforcer
from recon.solvers import GradientDescent
from tests.support.scope_fixtures import IGNORED, prepared, same, save_tiny, trainer_of, weights_of

pytestmark = [pytest.mark.filterwarnings("error"), *(pytest.mark.filterwarnings(one) for one in IGNORED)]

SCOPES: dict[str, Any] = {
    "matrix": lambda name: MatrixReconstruction(name=name, batch_size=4),
    "matrix by descent": lambda name: MatrixReconstruction(name=name, batch_size=4, solver=GradientDescent(steps=3)),
    "submodule": lambda name: SubmoduleDistillation(name=name, epochs=1, batch_size=4),
    "block": lambda name: BlockDistillation(name=name, epochs=1, batch_size=4),
    "full": lambda name: FullRetraining(name=name, epochs=1),
}


class Count(Callback):
    """How many enforcers a trainer has when it trains."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.enforcers = [one for one in trainer.callbacks if isinstance(one, MaskEnforcer)]


def test_the_public_name() -> None:
    assert callbacks.MaskEnforcer is MaskEnforcer


@pytest.mark.parametrize("scope", SCOPES)
def test_an_own_list_of_callbacks_changes_nothing(scope: str, tmp_path: Path) -> None:
    count = Count()
    own = prepared(SCOPES[scope](save_tiny("llama", tmp_path)))
    trainer_of(count).fit(own)
    assert len(count.enforcers) == 1
    assert own.masks.violations(own.model) == 0
    named = prepared(SCOPES[scope](save_tiny("llama", tmp_path)))
    trainer_of(MaskEnforcer(), count).fit(named)
    assert same(weights_of(own.model), weights_of(named.model))


@pytest.mark.parametrize("kind", [MaskEnforcer, type("Own", (MaskEnforcer,), {})])
def test_never_twice(kind: type[MaskEnforcer], tmp_path: Path) -> None:
    named, count = kind(), Count()
    scope = prepared(SCOPES["full"](save_tiny("llama", tmp_path)))
    trainer = trainer_of(named, count)
    for _ in range(2):  # a trainer that fits again has the one of before
        trainer.fit(scope)
        assert count.enforcers == [named]


def test_a_callback_of_a_user_stays_beside_it(tmp_path: Path) -> None:
    count, own = Count(), LearningRateMonitor()
    trainer = trainer_of(count)
    trainer.callbacks.append(own)
    trainer.loggers = [DummyLogger()]  # which it asks for
    trainer.fit(prepared(SCOPES["full"](save_tiny("llama", tmp_path))))
    assert own in trainer.callbacks
    assert len(count.enforcers) == 1
