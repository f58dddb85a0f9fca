"""`recon plan`: predict memory, disk, FLOPs and time of every scope from the model's configuration alone."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from recon.basics.units import in_bytes
from recon.cli.arguments import choose_device
from recon.cli.fit import ParsingCLI, _cli, choose_optimizer
from recon.cli.quiet import quiet
from recon.cli.trainer_identity import class_at
from recon.data import TokenData
from recon.experiment.requirements import require_matrices
from recon.models.loading import ModelSource
from recon.planner import SCOPES, Kind, PlanOptions, Prediction, Proposal, Shape, predict, print_plan, propose
from recon.planner.fake.model import FakeModel
from recon.planner.options import require_plannable
from recon.planner.rates import Rates, as_rates
from recon.planner.speed import measured_speeds
from recon.planner.trainer_options import configured_trainer_options
from recon.pruning.patterns import Pattern
from recon.pruning.prune import Pruning, require_fit
from recon.report import Results
from recon.scopes import BlockDistillation, FullRetraining, MatrixReconstruction, Scope, SubmoduleDistillation
from recon.scopes.distillation import Distillation
from recon.scopes.local.module import LocalScope

KINDS: dict[str, type[Scope]] = {
    kind.scope: kind for kind in (MatrixReconstruction, SubmoduleDistillation, BlockDistillation, FullRetraining)
}

SHARED = ("name", "shape", "dtype", "revision", "tokenizer", "trust_remote_code", "save_dtype")
"""Options that the rows of other scopes take from the configured scope."""

SHARED_LOCALLY = (
    "batch_size",
    "propagation",
    "offload",
    "activations",
    "activations_budget",
    "activations_host_budget",
    "activations_dtype",
)
"""Further options that local scopes take from a local scope."""

SHARED_BY_DISTILLATION = ("epochs", "parameters", "start")
"""Further options that submodule and block scope take from each other."""

OWN = ("device_memory", "flop_rate", "rates", "scopes", "json")
"""Options that only `recon plan` has."""


BUILT = ("model", "data", "pattern", "pruning")
"""Options whose classes are built."""


class PlanCLI(ParsingCLI):
    """Parses the options of `recon fit` and those of a plan."""

    command = "plan"

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Build the parser with the name and description of this command."""
        described = {"prog": "recon plan", "description": "Predict memory, disk and FLOPs before anything is loaded."}
        return super().init_parser(**kwargs | described)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of a plan."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--device_memory", type=str | None, default=None, help="Of one device, such as 24GiB: say what fits."
        )
        parser.add_argument(
            "--flop_rate",
            type=float | str | None,
            default=None,
            help="FLOP/s of one device: say how long it takes. `measure`: train a block of this model here, in "
            "seconds. Or the directory of a run or comparison: as fast as its scopes were.",
        )
        parser.add_argument(
            "--rates",
            type=dict[str, float] | None,
            default=None,
            help="FLOP/s of one device by precision, in place of --flop_rate; those of configs/devices/h100.yaml by "
            "default, unless trainer.accelerator is cpu.",
        )
        parser.add_argument("--scopes", type=list[str], default=list(SCOPES), help="The rows.")
        parser.add_argument("--json", type=bool, default=False, help="Print JSON, all amounts in bytes.")


def main(args: list[str]) -> int:
    """Parse, predict, print."""
    quiet()
    named = any(arg.startswith("scopes/") for arg in args)  # else any will do, for there is a row for each
    defaults = ["-c", "devices/h100", *([] if named else ["-c", "scopes/submodule"])]
    cli = _cli([*defaults, *args], PlanCLI)
    config = cli.config
    memory = None if config.device_memory is None else in_bytes(config.device_memory)
    if unknown := [name for name in config.scopes if name not in SCOPES]:
        raise ValueError(f"--scopes needs some of {', '.join(SCOPES)}, got {', '.join(unknown)}")
    built: Any = cli.parser.instantiate_classes(Namespace(**{name: config[name] for name in BUILT}))
    scope, data = built.model, built.data
    choose_optimizer(scope, config)
    scopes, shape = _rows(scope, config), Shape(scope.source)
    rows = [_in_default_dtype(_options(one, data, config), one, shape) for one in scopes]
    for row in rows:
        if row.scope == scope.scope:
            _require_fit(scope, shape.fake(row), built.pattern, built.pruning)
    speeds = [_speed(config.flop_rate, scope.source, options, config.trainer) for options in rows]
    rates = _rates(config, config.flop_rate)
    predictions = [predict(shape, *both, rates) for both in zip(rows, speeds, strict=True)]
    proposals = {} if memory is None else _proposals(shape, predictions, memory)
    if config.json:
        print(json.dumps(_as_dict(shape, predictions, proposals, memory, speeds), indent=2))
        return 0
    print_plan(shape, predictions, Console(highlight=False), memory, proposals)
    if proposals.get(scope.scope):
        changes = " ".join(proposals[scope.scope][0].arguments)
        print(f"To run {scope.scope} so: recon fit {shlex.join(_of_fit(args))} {changes}")
    return 0


@dataclass(frozen=True)
class PlannedRun:
    """One command of `recon fit`, as a plan has it.

    Attributes:
        source: The model.
        shape: Its configuration.
        options: The options of the run.
        config: All options of the command.
    """

    source: ModelSource
    shape: Shape
    options: PlanOptions
    config: Namespace

    def measured_speeds(self) -> dict[Kind, float]:
        """FLOP/s of one process on the device that the run would use, measured now."""
        return measured_speeds(self.source, self.options, _device(self.config.trainer))


def planned_run(args: list[str]) -> PlannedRun:
    """Plan one command of `recon fit`, and refuse what it would refuse when it has loaded the model.

    Args:
        args: Arguments of `recon fit`.
    """
    cli = _cli(["-c", "devices/h100", *args], PlanCLI)
    config = cli.config
    built: Any = cli.parser.instantiate_classes(Namespace(**{name: config[name] for name in BUILT}))
    choose_optimizer(built.model, config)
    shape = Shape(built.model.source)
    options = _in_default_dtype(_options(built.model, built.data, config), built.model, shape)
    _require_fit(built.model, shape.fake(options), built.pattern, built.pruning)
    return PlannedRun(built.model.source, shape, options, config)


def prediction_of(args: list[str], flop_rate: float | str | None = None) -> Prediction:
    """Predict the needs of one command of `recon fit`.

    Args:
        args: Arguments of `recon fit`.
        flop_rate: As the option of `recon plan`.
    """
    run = planned_run(args)
    speed = _speed(flop_rate, run.source, run.options, run.config.trainer)
    return predict(run.shape, run.options, speed, _rates(run.config, flop_rate))


def _rates(config: Namespace, flop_rate: float | str | None) -> Rates | None:
    """The rates of the device by precision, where they are the ones to predict with."""
    if flop_rate is not None or config.rates is None or config.trainer.accelerator == "cpu":
        return None
    return as_rates(config.rates)


def _in_default_dtype(options: PlanOptions, scope: Scope, shape: Shape) -> PlanOptions:
    """Plan a scope whose precision is open in the one that it has on its device."""
    given = scope.source
    scope.settle(torch.device(options.device))
    stored = shape.stored if scope.source == given else scope.source.skeleton().dtype
    return options if stored == shape.stored else replace(options, dtype=stored)


def _require_fit(scope: Scope, fake: FakeModel, pattern: Pattern | None, pruning: Pruning | None) -> None:
    """Refuse what `recon fit` refuses once it has loaded the model."""
    require_plannable(pattern)
    pruning = pruning or Pruning()
    prunable = fake.prunable(pruning.exclude)
    if pattern is not None:
        require_fit(prunable, pattern, pruning)
    require_matrices(scope, fake.anatomy, prunable)


def _of_fit(args: list[str]) -> list[str]:
    """Select the arguments that `recon fit` has too."""
    kept: list[str] = []
    skipping = False
    for arg in args:
        option, has_value = arg.removeprefix("--").partition("=")[::2]
        if arg.startswith("--") and option in OWN:
            skipping = not has_value
        elif skipping:
            skipping = False
        else:
            kept.append(arg)
    return kept


def _device(trainer: Any) -> torch.device:
    """The first device that `recon fit` would use; another one of its kind if this machine lacks it."""
    if trainer.accelerator == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    index = trainer.devices[0] if isinstance(trainer.devices, list) else 0
    return choose_device(f"cuda:{index if index < torch.cuda.device_count() else 0}")


def _speed(
    given: float | str | None, source: ModelSource, options: PlanOptions, trainer: Any
) -> float | Mapping[Kind, float] | None:
    """The speed that `--flop_rate` gives for one row; None if it gives none for its scope."""
    if given is None or isinstance(given, float | int):
        return given
    if given == "measure":
        return measured_speeds(source, options, _device(trainer))
    cells = [cell for cell in Results.load(given).cells if cell.seconds and "flops" in cell.prediction]
    if not cells:
        raise ValueError(
            f"--flop_rate needs a number of FLOP/s, `measure`, or the directory of a run that recovered a model, got "
            f"{given}, whose report has no FLOPs and seconds"
        )
    found = [one.prediction["flops"] / one.seconds / one.prediction["setting"]["world_size"] for one in cells]
    return next((speed for speed, cell in zip(found, cells, strict=True) if cell.scope == options.scope), None)


def _rows(scope: Scope, config: Namespace) -> list[Scope]:
    """Build the configured scope with its options, and the others with their defaults on the same model."""
    given = config.model.init_args
    rows: list[Scope] = []
    for name in config.scopes:
        if name == scope.scope:
            rows.append(scope)
            continue
        shared = SHARED + SHARED_LOCALLY * (isinstance(scope, LocalScope) and issubclass(KINDS[name], LocalScope))
        shared += SHARED_BY_DISTILLATION * (isinstance(scope, Distillation) and issubclass(KINDS[name], Distillation))
        rows.append(KINDS[name](**{option: given[option] for option in shared if option in given}))
    return rows


def _options(scope: Scope, data: TokenData, config: Namespace) -> PlanOptions:
    """Collect the options of a row; a strategy that its scope cannot have is left out."""
    is_local = isinstance(scope, LocalScope)
    trainer = configured_trainer_options(config.trainer, is_local)
    if is_local and trainer["world_size"] > 1:
        scope.require_independent("strategy window_parallel")
    exclude, masked = tuple(config.pruning.exclude), config.pattern is not None
    measured = {"evaluates": True, "baselines": config.baselines, "drift": config.drift}
    return PlanOptions.of(scope, data, trainer | measured, exclude, masked, _prunes_by_gram(config))


def _prunes_by_gram(config: Namespace) -> bool:
    """Whether masks are chosen along with recovery, from Gram matrices."""
    if config.pruning.inputs != "recovered" or config.criterion is None:
        return False
    return config.refinement is not None or class_at(config.criterion.class_path).needs == "gram"


def _proposals(shape: Shape, predictions: list[Prediction], memory: int) -> dict[str, list[Proposal]]:
    too_large = [one for one in predictions if one.peak.total > memory]
    return {one.options.scope: propose(shape, one.options, memory) for one in too_large}


def _as_dict(
    shape: Shape,
    predictions: list[Prediction],
    proposals: dict[str, list[Proposal]],
    memory: int | None,
    speeds: Sequence[float | Mapping[Kind, float] | None],
) -> dict[str, Any]:
    rows = []
    for one, speed in zip(predictions, speeds, strict=True):
        row = one.as_dict() | {"flop_rate": one.speeds if speed is None and one.speeds else speed}
        if memory is not None:
            row["fits"] = one.peak.total <= memory
            row["proposals"] = [
                {"kind": two.kind, "options": two.arguments, **two.prediction.as_dict()}
                for two in proposals.get(one.options.scope, [])
            ]
        rows.append(row)
    return {
        "model": shape.name,
        "parameters": shape.num_parameters,
        "device_memory_bytes": memory,
        "scopes": rows,
    }
