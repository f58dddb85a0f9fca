"""`recon plan`: what recovery would need at every scope, from the model's configuration alone."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from recon.basics.units import in_bytes
from recon.cli.fit import ParsingCLI, _cli, choose_optimizer
from recon.cli.quiet import quiet
from recon.data import TokenData
from recon.distributed.strategies import WindowParallelStrategy
from recon.models.loading import ModelSource
from recon.planner import SCOPES, Kind, Prediction, Proposal, Setting, Shape, predict, print_plan, propose
from recon.planner.speed import measured_rates
from recon.report import Results
from recon.scopes import BlockDistillation, FullRetraining, MatrixReconstruction, Scope, SubmoduleDistillation
from recon.scopes.distillation import Distillation
from recon.scopes.local.module import LocalScope

KINDS: dict[str, type[Scope]] = {
    kind.scope: kind for kind in (MatrixReconstruction, SubmoduleDistillation, BlockDistillation, FullRetraining)
}

SHARED = ("name", "shape", "dtype", "revision", "tokenizer", "trust_remote_code", "save_dtype")
"""Options that the rows of other scopes take from the one that is configured."""

SHARED_LOCALLY = (
    "batch_size",
    "propagation",
    "offload",
    "activations",
    "activations_budget",
    "activations_host_budget",
    "activations_dtype",
)
"""Those that local scopes take from one."""

SHARED_BY_DISTILLATION = ("epochs", "parameters", "start")
"""Those that submodule and block scope take from each other."""

OWN = ("device_memory", "flop_rate", "scopes", "json")
"""Options that `recon fit` does not have."""


class PlanCLI(ParsingCLI):
    """Parses what `recon fit` takes, and what is asked of a plan."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that calls itself by its name."""
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
        parser.add_argument("--scopes", type=list[str], default=list(SCOPES), help="The rows.")
        parser.add_argument("--json", type=bool, default=False, help="Print JSON, all amounts in bytes.")


def main(args: list[str]) -> int:
    """Parse, predict, print."""
    quiet()
    named = any(arg.startswith("scopes/") for arg in args)  # else any will do, for there is a row for each
    cli = _cli(args if named else ["-c", "scopes/submodule", *args], PlanCLI)
    config = cli.config
    memory = None if config.device_memory is None else in_bytes(config.device_memory)
    if unknown := [name for name in config.scopes if name not in SCOPES]:
        raise ValueError(f"--scopes needs some of {', '.join(SCOPES)}, got {', '.join(unknown)}")
    built: Any = cli.parser.instantiate_classes(Namespace(model=config.model, data=config.data))
    scope, data = built.model, built.data
    choose_optimizer(scope, config)
    settings = [_setting(one, data, config) for one in _rows(scope, config)]
    shape = Shape(scope.source)
    rates = [_rate(config.flop_rate, scope.source, setting) for setting in settings]
    predictions = [predict(shape, *both) for both in zip(settings, rates, strict=True)]
    proposals = {} if memory is None else _proposals(shape, predictions, memory)
    if config.json:
        print(json.dumps(_as_dict(shape, predictions, proposals, memory, rates), indent=2))
        return 0
    print_plan(shape, predictions, Console(highlight=False), memory, proposals)
    if proposals.get(scope.scope):
        options = " ".join(proposals[scope.scope][0].options)
        print(f"To run {scope.scope} so: recon fit {shlex.join(_of_fit(args))} {options}")
    return 0


def _of_fit(args: list[str]) -> list[str]:
    """The arguments that `recon fit` knows, too."""
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


def _rate(given: float | str | None, source: ModelSource, setting: Setting) -> float | Mapping[Kind, float] | None:
    """What `--flop_rate` says of one row; None if it says nothing of its scope."""
    if given is None or isinstance(given, float | int):
        return given
    if given == "measure":
        has_device = setting.device == "cuda" and torch.cuda.is_available()
        return measured_rates(source, setting, torch.device("cuda" if has_device else "cpu"))
    cells = [cell for cell in Results.load(given).cells if cell.seconds and "flops" in cell.prediction]
    if not cells:
        raise ValueError(
            f"--flop_rate needs a number of FLOP/s, `measure`, or the directory of a run that recovered a model, got "
            f"{given}, whose report has no FLOPs and seconds"
        )
    found = [one.prediction["flops"] / one.seconds / one.prediction["setting"]["world_size"] for one in cells]
    return next((rate for rate, cell in zip(found, cells, strict=True) if cell.scope == setting.scope), None)


def _rows(scope: Scope, config: Namespace) -> list[Scope]:
    """The configured scope with its options, others by default on the same model."""
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


def _setting(scope: Scope, data: TokenData, config: Namespace) -> Setting:
    """The setting of a row; a strategy that a scope cannot have is left out of it."""
    trainer, exclude = config.trainer, tuple(config.pruning.exclude)
    setting = Setting.of(scope, data, exclude=exclude, masked=config.pattern is not None)
    device = "cpu" if trainer.accelerator == "cpu" else "cuda"
    setting = replace(setting, precision=_precision(trainer.precision), device=device)
    setting = replace(setting, accumulate=trainer.accumulate_grad_batches)
    num, strategy = _devices(trainer.devices) * trainer.num_nodes, _strategy(trainer.strategy)
    processes = {"world_size": num, "num_nodes": trainer.num_nodes}
    if isinstance(scope, LocalScope):
        if num == 1 or strategy != {"sharding": WindowParallelStrategy.strategy_name}:
            return setting
        scope.require_independent("strategy window_parallel")
        return replace(setting, **processes)
    if strategy == {"sharding": WindowParallelStrategy.strategy_name}:
        return setting
    return replace(setting, **processes, **strategy)


def _strategy(strategy: Any) -> dict[str, Any]:
    if isinstance(strategy, str):
        parallel = strategy == WindowParallelStrategy.strategy_name
        return {"sharding": strategy if parallel else "ddp" if strategy.startswith("ddp") else "none"}
    if strategy is None:
        return {}
    kind, options = strategy.class_path.rpartition(".")[2], strategy.init_args
    if kind == "WindowParallelStrategy":
        return {"sharding": WindowParallelStrategy.strategy_name}
    if kind == "FullyShardedStrategy":
        return {"sharding": "fsdp2"}
    if kind != "ZeroStrategy":
        raise ValueError(
            f"planning knows ddp, window_parallel, recon.strategies.ZeroStrategy and FullyShardedStrategy, got "
            f"{strategy.class_path}; choose one of configs/strategies"
        )
    names = ("offload_optimizer", "offload_parameters")
    return {"sharding": f"zero{options.stage}", **{name: bool(options[name]) for name in names}}


def _precision(precision: Any) -> str:
    return {"32": "32-true", "None": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}.get(
        str(precision), str(precision)
    )


def _devices(devices: Any) -> int:
    if isinstance(devices, list):
        return len(devices)
    if str(devices).isdigit() and int(devices) > 0:
        return int(devices)
    raise ValueError(f"planning needs a number of trainer.devices, got {devices!r}; give one")


def _proposals(shape: Shape, predictions: list[Prediction], memory: int) -> dict[str, list[Proposal]]:
    too_large = [one for one in predictions if one.peak.total > memory]
    return {one.setting.scope: propose(shape, one.setting, memory) for one in too_large}


def _as_dict(
    shape: Shape,
    predictions: list[Prediction],
    proposals: dict[str, list[Proposal]],
    memory: int | None,
    rates: Sequence[float | Mapping[Kind, float] | None],
) -> dict[str, Any]:
    rows = []
    for one, rate in zip(predictions, rates, strict=True):
        row = one.as_dict() | {"flop_rate": rate}
        if memory is not None:
            row["fits"] = one.peak.total <= memory
            row["proposals"] = [
                {"kind": two.kind, "options": two.options, **two.prediction.as_dict()}
                for two in proposals.get(one.setting.scope, [])
            ]
        rows.append(row)
    return {
        "model": shape.name,
        "parameters": shape.num_parameters,
        "device_memory_bytes": memory,
        "scopes": rows,
    }
