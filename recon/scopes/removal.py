"""Recovery after the removal of whole experts: what it needs of scope and strategy."""

import lightning as L

from recon.distributed.strategies import FullyShardedStrategy, ZeroStrategy
from recon.models.live import LiveModel
from recon.scopes.base import Scope


def require_recoverable(scope: Scope, trainer: L.Trainer) -> None:
    """Refuse a scope or a strategy by which a model that has lost whole experts cannot be recovered.

    Raises:
        ValueError: Naming the option.
    """
    strategy = trainer.strategy
    shards = isinstance(strategy, FullyShardedStrategy) or (isinstance(strategy, ZeroStrategy) and strategy.stage == 3)
    if scope.scope == "matrix":
        got = "the matrix scope, in which a matrix makes up for its own zeros alone"
    elif scope.start not in ("pruned", "auto"):
        got = f"model.start: {scope.start}"
    elif vars(scope).get("groups") is not None:
        got = "model.windows, groups of linear maps"
    elif vars(scope).get("compiles"):
        got = "model.compile: true, which cannot follow the choice between the dense and the smaller mixture"
    elif isinstance(scope.source, LiveModel):
        got = "a live model, whose parameters keep their shapes: save it and use `recon fit`"
    elif shards:
        got = f"{type(strategy).__name__}, which shards the parameters that a mixture selects from"
    else:
        return
    raise ValueError(
        f"where whole experts are removed, the others start from their dense weights and mixtures are recovered whole, "
        f"got {got}; choose scopes/submodule, scopes/block or scopes/full with model.start: pruned and a strategy that "
        f"leaves parameters whole"
    )
