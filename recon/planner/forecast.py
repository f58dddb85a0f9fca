"""The prediction that stands in a run's report beside what the run measures."""

from typing import Any

import lightning as L

from recon.data import TokenData
from recon.planner.memory import Shape, predict
from recon.planner.setting import Setting
from recon.scopes import Scope


def forecast(
    scope: Scope, data: TokenData, trainer: L.Trainer, exclude: tuple[str, ...], masked: bool
) -> dict[str, Any]:
    """What the run is predicted to need, as plain data; `reason` alone if that cannot be said.

    Takes a second or less, loads nothing, and leaves the run as it was.

    Args:
        scope: Of the run, before or after it is loaded.
        data: Of the run.
        trainer: Of the run.
        exclude: Patterns of modules that stay dense.
        masked: Whether the model is pruned.
    """
    try:
        setting = Setting.of(scope, data, trainer, exclude=exclude, masked=masked)
        return predict(Shape(scope.source), setting).as_dict()
    except ValueError as error:
        return {"reason": str(error)}
