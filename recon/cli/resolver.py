"""What a command of a comparison is, all its options resolved, without running it."""

from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from recon.cli import prune, test
from recon.cli.arguments import describe, parse
from recon.cli.building import require_devices
from recon.cli.costs import Costs
from recon.cli.fit import choose_optimizer, parse_options
from recon.cli.tasks import TASK_OPTIONS, identity_of_tasks
from recon.experiment.comparison.resolver import Resolver
from recon.report.parts import Quantity

NOT_DECISIVE = ("config", "run_dir", "summary", "verbose", "masks")
"""Where results go and what is printed; the file of the masks is keyed by its directory, which the command names."""

BUILT = ("model", "data", "criterion", "pattern", "pruning")
"""Options of `recon fit` whose classes are built, so that what they refuse is known before the first cell runs."""


class CommandResolver(Resolver):
    """Reads the commands of a comparison as the child processes will.

    Args:
        directory: Where measured speeds are kept; nowhere if None.
        gpus: GPUs of each process where the cells run; None if they run on this machine.
    """

    def __init__(self, directory: Path | None = None, gpus: int | None = None) -> None:
        self._is_elsewhere = gpus is not None
        self.on_gpu = torch.cuda.is_available() if gpus is None else gpus > 0
        self._known: dict[tuple[str, ...], Any] = {}
        self._costs = Costs(directory)

    def describe(self, kind: type, spec: dict[str, Any]) -> str:
        """The name of a criterion, refinement, pattern or allocation that a class specification makes."""
        return describe(kind, spec)

    def resolved(self, command: list[str]) -> Any:
        """All options of a command, with what its configurations say, and the identity of its data, as JSON.

        Raises:
            UsageError: If the command cannot be understood.
        """
        if tuple(command) not in self._known:
            self._known[tuple(command)] = self._resolved(*command)
        return self._known[tuple(command)]

    def cost(self, command: list[str], quantity: Quantity) -> float:
        """What `recon plan` says that a command of `recon fit` needs of `quantity`."""
        return self._costs.of(command, quantity)

    def within(self, command: list[str], quantity: Quantity, limit: float) -> tuple[dict[str, int], float] | None:
        """The options by which a command of `recon fit` trains as long as `limit` allows, and what it then needs."""
        return self._costs.within(command, quantity, limit)

    def _resolved(self, name: str, *args: str) -> dict[str, Any]:
        config, data = _fit([*args]) if name == "fit" else _other(name, [*args])
        if name == "fit" and not self._is_elsewhere:
            require_devices(config.trainer)
        options = {key: value for key, value in config.as_dict().items() if key not in (*NOT_DECISIVE, *TASK_OPTIONS)}
        return {"options": options, "text": data.identity(), **identity_of_tasks(config)}


def _fit(args: list[str]) -> tuple[Namespace, Any]:
    parser, config = parse_options(args)
    built: Any = parser.instantiate_classes(Namespace(**{name: config[name] for name in BUILT}))
    choose_optimizer(built.model, config)
    return config, built.data


def _other(name: str, args: list[str]) -> tuple[Namespace, Any]:
    config, built = parse({"prune": prune, "test": test}[name].build_parser(), args)
    return config, built.data
