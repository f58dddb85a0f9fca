"""`recon fit`: prune a model and recover it at one scope, configured by LightningCLI."""

import logging
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console

from recon.basics.files import atomic_write
from recon.cli.arguments import add_pruning_arguments
from recon.cli.configs import config_directory, resolve_config_names
from recon.cli.quiet import quiet
from recon.data import TokenData
from recon.distributed.part import Share
from recon.distributed.ranks import rank
from recon.experiment.checkpoints import STOPPED, Checkpoints
from recon.experiment.directory import RunDirectory, digest
from recon.experiment.environment import versions
from recon.experiment.recovery import recover
from recon.planner.prediction import forecast
from recon.report import Results, print_table, table_console, with_references
from recon.report.log import LOG, log_to
from recon.scopes import FullRetraining, Scope
from recon.scopes.local.module import LocalScope

NOT_FINGERPRINTED = (
    "config",
    "run_dir",
    "masks",
    "windows",
    "baselines",
    "evaluate_on",
    "drift",
    "summary",
    "verbose",
    "trainer",
    "checkpoint_every_n_steps",
)
"""Parts of the configuration that do not decide what a run computes, or whose content is taken instead."""

NOT_FINGERPRINTED_OF_MODEL = ("activations", "activations_budget", "activations_host_budget")
"""As above: a run whose disk was full goes on with its activations elsewhere."""

DECISIVE = (
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
)
"""Options of the trainer that decide what a run computes."""


class FitCLI(LightningCLI):
    """LightningCLI with the options of pruning and of the run directory."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what a scope and a trainer do not have."""
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Where the run goes; runs/<scope>-<fingerprint> if null.",
        )
        parser.add_argument(
            "--masks", type=str | None, default=None, help="A masks.safetensors to use instead of pruning."
        )
        parser.add_argument(
            "--windows",
            type=str | None,
            default=None,
            help="Recover only one part of the windows, such as 3/16, and end; `recon merge` puts all together.",
        )
        parser.add_argument(
            "--baselines",
            type=bool,
            default=True,
            help="Measure the dense and the pruned model's perplexity too.",
        )
        parser.add_argument(
            "--evaluate_on",
            type=Literal["test", "validation"],
            default="test",
            help="The split that perplexity is measured on; validation is for choosing options.",
        )
        parser.add_argument(
            "--drift",
            type=bool,
            default=True,
            help="Measure on the validation split how far hidden states and predictions are from the dense model's.",
        )
        parser.add_argument(
            "--checkpoint_every_n_steps",
            type=int,
            default=100,
            help="Optimizer steps between two checkpoints of full retraining.",
        )
        parser.add_argument("--summary", type=bool, default=True, help="Print the report as a table in the end.")
        parser.add_argument("--verbose", action="store_true", help="Add tables of memory, predictions and drift.")
        add_pruning_arguments(parser)
        parser.link_arguments("seed_everything", "data.seed")

    def before_instantiate_classes(self) -> None:
        """Settle the run directory, which trainer, logger and checkpoints go by."""
        masks = self.config.masks
        self.share = None if self.config.windows is None else Share.parse(self.config.windows)
        self.config.windows = None  # of this job, not of the run
        options = {key: value for key, value in self.config.as_dict().items() if key not in NOT_FINGERPRINTED}
        options["trainer"] = {name: self.config.trainer[name] for name in DECISIVE}
        for name in NOT_FINGERPRINTED_OF_MODEL:
            options["model"]["init_args"].pop(name, None)
        self.fingerprint: dict[str, Any] = {"options": options, "versions": versions()}
        if masks is not None and Path(masks).is_file():
            self.fingerprint["masks"] = digest(Path(masks).read_bytes().hex())
        scope = self.config.model.class_path.rpartition(".")[2]
        default = f"runs/{scope}-{digest(self.fingerprint)[:8]}"
        self.run_dir = Path(self.config.run_dir or default)
        self.config.trainer.default_root_dir = str(self.run_dir)
        self.config.run_dir = str(self.run_dir)


def parse_only(args: list[str]) -> Any:
    """The configuration that `args` make, with nothing built."""
    return _cli(args, ParsingCLI).config


class ParsingCLI(FitCLI):
    """FitCLI that stops after parsing."""

    def instantiate_classes(self) -> None:
        """Build nothing."""


def _cli(args: list[str], kind: type[FitCLI] = FitCLI) -> FitCLI:
    return kind(
        Scope,
        TokenData,
        subclass_mode_model=True,
        run=False,
        save_config_callback=None,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_kwargs={
            "prog": "recon fit",
            "exit_on_error": False,
            "description": "Prune a model and recover it at one scope.",
            "default_config_files": [str(config_directory() / "base.yaml")],
        },
        trainer_defaults={"logger": False},
        args=resolve_config_names(args),
    )


def main(args: list[str]) -> int:
    """Parse, build, run, report."""
    return run(args)


def run(args: list[str], merge: bool = False) -> int:
    """As `main`; with `merge` only what remains when all windows are written."""
    quiet()
    cli = _cli(args)
    built: Any = cli.config_init
    scope, data, trainer = cli.model, cli.datamodule, cli.trainer
    if (built.criterion is None) != (built.pattern is None):
        raise ValueError("pruning needs both criterion and pattern; give both, or null for both to train unpruned")
    first = rank() == 0
    identity = {"model": scope.source.identity(), "data": data.source.identity()} if first else {}
    directory = RunDirectory(cli.run_dir, {**cli.fingerprint, **identity} if first else None)
    if first:
        _save_config(cli)
    if not trainer.loggers:
        version = "" if cli.share is None else directory.part(cli.share).name  # jobs do not share a curve
        trainer.loggers = [TensorBoardLogger(str(directory.path), name="logs", version=version)]
    if isinstance(scope, FullRetraining):
        trainer.callbacks.append(Checkpoints(directory.checkpoints, cli.config.checkpoint_every_n_steps))  # pyright: ignore[reportAttributeAccessIssue]
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
        if not cli.config.verbose and hasattr(callback, "print_table"):
            callback.print_table = False
    exclude = () if built.pruning is None else tuple(built.pruning.exclude)
    console = Console(highlight=False, soft_wrap=True)

    def say(line: str) -> None:
        console.print(line)
        logging.getLogger("recon").info(line)

    log = (directory.path if cli.share is None else directory.part(cli.share)) / LOG
    logged = log_to(log)(recover) if first else recover
    try:
        report = logged(
            scope,
            data,
            trainer,
            directory,
            built.criterion,
            built.pattern,
            built.pruning,
            None if cli.config.masks is None else Path(cli.config.masks),
            cli.config.baselines,
            cli.config.evaluate_on,
            cli.config.drift,
            say,
            cli.share,
            merge,
            partial(forecast, scope, data, trainer, exclude, masked=built.pattern is not None),
        )
    except SIGTERMException:
        if first:
            where = directory.path
            console.print(f"stopped by SIGTERM; what was done is in {where}, the same command goes on from there")
        raise SIGTERMException(STOPPED) from None  # Lightning's own exit status would be 0, as if it had ended
    if isinstance(scope, LocalScope) and cli.share is not None:
        console.print(
            f"part {cli.share}: {len(scope.own_windows)} of {len(scope.windows)} windows are in "
            f"{directory.path / 'windows'}; when all parts have ended: recon merge {directory.path}"
        )
    if report is None:
        return 0
    if cli.config.summary:
        print_table(Results(with_references(report)), table_console(), cli.config.verbose)
    path = directory.path
    console.print(f"run directory {path}: model/, report.json, memory.json; tensorboard --logdir {path}/logs")
    return 0


def _save_config(cli: FitCLI) -> None:
    with atomic_write(cli.run_dir / "config.yaml") as temporary:
        cli.parser.save(cli.config, temporary, skip_unset=False, overwrite=True, multifile=False)
