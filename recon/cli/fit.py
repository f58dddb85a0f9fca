"""`recon fit`: prune a model and recover it at one scope, configured by LightningCLI."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console
from torch.optim import Optimizer

from recon.basics.digests import digest
from recon.basics.locks import owned
from recon.basics.run_paths import RunPaths
from recon.cli.arguments import (
    add_pruning_arguments,
    add_summary_arguments,
    default_data,
    keep_own_defaults,
    plain_data,
    require_seed,
)
from recon.cli.arrange import arrange
from recon.cli.building import packages, trainer_of
from recon.cli.configs import config_directory
from recon.cli.errors import usage
from recon.cli.loggers import in_run_directory
from recon.cli.names import with_short_paths
from recon.cli.quiet import quiet
from recon.cli.tasks import TASK_OPTIONS, add_task_arguments, identity_of_tasks, suite_of
from recon.cli.trainer_identity import class_at, decisive
from recon.data import TokenData
from recon.data.texts import Texts
from recon.distributed import ranks
from recon.distributed.part import Share
from recon.experiment.checkpoints import STOPPED, Checkpoints
from recon.experiment.directory import RunDirectory
from recon.experiment.environment import versions
from recon.experiment.options import RunOptions
from recon.experiment.origin import Origin
from recon.experiment.recovery import recover
from recon.planner.prediction import forecast
from recon.pruning.masks import Masks, identity_of
from recon.pruning.prune import Pruning
from recon.pruning.refinement import refined
from recon.report import Report, Results, print_table, table_console, with_references
from recon.report.log import log_to
from recon.scopes import Scope
from recon.scopes.optimization import LRSchedulerRecipe, OptimizerRecipe

NOT_FINGERPRINTED = (
    "config",
    "run_dir",
    "masks",
    "from",
    "windows",
    "baselines",
    "evaluate_on",
    "drift",
    *TASK_OPTIONS,
    "summary",
    "verbose",
    "trainer",
    "checkpoint_every_n_steps",
    "__default_config__",
)
"""Parts of the configuration that do not decide what a run computes, or whose content is taken instead."""

NOT_FINGERPRINTED_OF_MODEL = ("activations", "activations_budget", "activations_host_budget")
"""As above: a run whose disk was full goes on with its activations elsewhere."""

Recipe = TypeVar("Recipe", OptimizerRecipe, LRSchedulerRecipe)


class FitCLI(LightningCLI):
    """LightningCLI with the options of pruning and of the run directory."""

    command = "fit"

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
            "--from",
            type=str | None,
            default=None,
            help="Start from the weights of another run, under its masks, in place of model.start.",
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
        add_summary_arguments(parser)
        add_task_arguments(parser)
        add_pruning_arguments(parser)
        default_data(parser)
        parser.link_arguments("seed_everything", "data.init_args.seed")
        parser.add_optimizer_args((Optimizer,))
        parser.add_lr_scheduler_args()

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """As LightningCLI's; a user's class of data keeps its own defaults."""
        super().parse_arguments(parser, args)
        if keep_own_defaults(parser, self.config):
            super().parse_arguments(parser, args)
        require_seed(self.config.seed_everything)

    def before_instantiate_classes(self) -> None:
        """Settle the run directory, which trainer, logger and checkpoints go by."""
        if not isinstance(self.config.trainer, Namespace):
            raise ValueError(f"trainer needs options of Lightning's Trainer, got {self.config.trainer}; leave it out")
        masks = self.config.masks
        self.share = None if self.config.windows is None else Share.parse(self.config.windows)
        self.config.windows = None  # of this job, not of the run
        if self.config["from"] is not None:
            self.config.model.init_args.start = "run"
        options = {key: value for key, value in self.config.as_dict().items() if key not in NOT_FINGERPRINTED}
        options["trainer"] = decisive(self.config.as_dict()["trainer"])
        options |= {"data": plain_data(options["data"])}
        for name in ("optimizer", "lr_scheduler"):
            if options[name] is None:
                del options[name]  # the scope's own
        for name in NOT_FINGERPRINTED_OF_MODEL:
            options["model"]["init_args"].pop(name, None)
        tasks = identity_of_tasks(self.config)
        self.fingerprint: dict[str, Any] = {"options": with_short_paths(options), "versions": versions(), **tasks}
        if masks is not None and Path(masks).is_file():
            self.fingerprint["masks"] = identity_of(Path(masks))
        if self.config["from"] is not None:
            self.fingerprint["from"] = Origin(Path(self.config["from"])).identity()
        scope = self.config.model.class_path.rpartition(".")[2]
        default = f"runs/{scope}-{digest(self.fingerprint)[:8]}"
        self.run_dir = Path(self.config.run_dir or default)
        self.config.run_dir = str(self.run_dir)
        if (root := self.config.trainer.default_root_dir) not in (None, self.config.run_dir):
            raise ValueError(f"a run is written to --run_dir, got trainer.default_root_dir {root}; leave it out")

    def instantiate_classes(self) -> None:
        """Build, with logs in the run directory, and hand the scope its optimizer.

        Raises:
            ValueError: If a class needs a package that is not installed, or options of the trainer contradict.
        """
        given, self.config = self.config, self.config.clone()
        held = _part(self)
        part = "" if held is None else held.name
        self.config.trainer.logger = in_run_directory(given.trainer.logger, self.run_dir, part)
        try:
            with packages():
                super().instantiate_classes()
        finally:
            self.config = given
        self.datamodule.seed = given.seed_everything  # of a class that takes no seed, too
        choose_optimizer(self.model, given)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """As LightningCLI's, with what the trainer writes by itself in the run directory.

        Raises:
            ValueError: If this machine lacks the devices, or options contradict.
        """
        with trainer_of(self.config.trainer):
            return super().instantiate_trainer(default_root_dir=str(self.run_dir), **kwargs)


def parse_only(args: list[str]) -> Any:
    """The configuration that `args` make, with nothing built."""
    return parse_options(args)[1]


def parse_options(args: list[str]) -> tuple[LightningArgumentParser, Any]:
    """The parser, which can build parts of what it has parsed, and the configuration that `args` make."""
    cli = _cli(args, ParsingCLI)
    return cli.parser, cli.config


class ParsingCLI(FitCLI):
    """FitCLI that stops after parsing."""

    def instantiate_classes(self) -> None:
        """Build nothing."""


def _cli(args: list[str], kind: type[FitCLI] = FitCLI) -> FitCLI:
    with usage():
        return kind(
            Scope,
            TokenData,
            subclass_mode_model=True,
            subclass_mode_data=True,
            run=False,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={
                "prog": f"recon {kind.command}",
                "exit_on_error": False,
                "description": "Prune a model and recover it at one scope.",
                "default_config_files": [str(config_directory() / "base.yaml")],
            },
            args=arrange(kind.command, args),
        )


def main(args: list[str]) -> int:
    """Parse, build, run, report."""
    return run(args)


def run(args: list[str], merge: bool = False) -> int:
    """As `main`; with `merge` only what remains when all windows are written."""
    quiet()
    cli = _cli(args)
    console, path = Console(highlight=False, soft_wrap=True), cli.run_dir
    try:
        report = execute(cli, merge=merge)
    except SIGTERMException:
        if ranks.rank() == 0:
            console.print(f"stopped; what was done is in {path}, the same command goes on from there")
        raise SIGTERMException(STOPPED) from None  # Lightning's own exit status would be 0, as if it had ended
    ranks.finish(cli.trainer)
    if cli.share is not None:
        console.print(
            f"part {cli.share}: {len(cli.model.own_windows)} of {len(cli.model.windows)} windows are in "
            f"{RunPaths(path).windows}; when all parts have ended: recon merge {path}"
        )
    if report is None:
        return 0
    if cli.config.summary:
        print_table(Results(with_references(report)), table_console(), cli.config.verbose)
    console.print(f"run directory {path}: model/, report.json, memory.json; tensorboard --logdir {path}/logs")
    return 0


def execute(cli: FitCLI, masks: Masks | None = None, merge: bool = False, texts: Texts | None = None) -> Report | None:
    """Recover what `cli` has built: the way of the command and of the library.

    Args:
        cli: Parsed and instantiated.
        masks: In memory, in place of a file.
        merge: Train nothing.
        texts: Documents in memory, written to the run directory.

    Returns:
        The report; None on ranks other than 0, and of a part.

    Raises:
        ValueError: If options, masks and model do not fit together, or another process owns the run directory.
    """
    options, first = _options(cli, masks, merge), ranks.rank() == 0
    scope, data = cli.model, cli.datamodule
    scope.settle(cli.trainer.strategy.root_device)
    identity = {"model": scope.source.identity(), "data": data.identity()} if first else {}
    if not scope.by_window:  # windows are the same, however many processes share them
        identity["processes"] = cli.trainer.num_devices * cli.trainer.num_nodes
    with owned(cli.run_dir, _part(cli)) if first else nullcontext():
        directory = RunDirectory(cli.run_dir, {**cli.fingerprint, **identity} if first else None)
        if first:
            if cli.share is None:
                directory.sweep()
            _save_config(cli, directory)
            if texts is not None:
                texts.write(directory.text, directory.manifest.writing)
        return _recover(cli, directory, options)


def _part(cli: FitCLI) -> Path | None:
    """The directory of this job's part, which it owns while other jobs own theirs; None of the whole run."""
    return None if cli.share is None else RunDirectory(cli.run_dir, None).part(cli.share)


def _recover(cli: FitCLI, directory: RunDirectory, options: RunOptions) -> Report | None:
    """`recover` in a directory that this process owns, or that rank 0 owns for it."""
    scope, data, trainer, first = cli.model, cli.datamodule, cli.trainer, ranks.rank() == 0
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
        if not cli.config.verbose and hasattr(callback, "print_table"):
            callback.print_table = False
    if not scope.by_window:
        trainer.callbacks.append(Checkpoints(directory.checkpoints, cli.config.checkpoint_every_n_steps))  # pyright: ignore[reportAttributeAccessIssue]
    if first and not directory.is_finished:
        exclude, criterion = tuple(options.pruning.exclude), options.criterion
        by_gram = criterion is not None and options.interleaves and criterion.needs == "gram"
        predicted = forecast(scope, data, trainer, exclude, options.prunes, by_gram, options.pattern)
        options = replace(options, prediction=predicted)
    with log_to(directory.measurements(cli.share).log) if first else nullcontext():
        return recover(scope, data, trainer, directory, options)


def choose_optimizer(scope: Scope, config: Namespace) -> None:
    """Hand `--optimizer` and `--lr_scheduler` to the scope, which refuses those that it cannot honour."""
    scope.choose_optimizer(_recipe(OptimizerRecipe, config.optimizer), _recipe(LRSchedulerRecipe, config.lr_scheduler))


def _recipe(kind: type[Recipe], given: Namespace | None) -> Recipe | None:
    """The recipe of a class that is configured by `class_path` and `init_args`."""
    if given is None:
        return None
    return kind(class_at(given.class_path), given.get("init_args", Namespace()).as_dict())


def _options(cli: FitCLI, masks: Masks | None, merge: bool) -> RunOptions:
    config: Any = cli.config
    built: Any = cli.config_init
    return RunOptions(
        criterion=refined(built.criterion, built.refinement),
        pattern=built.pattern,
        pruning=built.pruning or Pruning(),
        masks=masks if masks is not None or config.masks is None else Path(config.masks),
        origin=None if config["from"] is None else Origin(Path(config["from"])),
        baselines=config.baselines,
        evaluate_on=config.evaluate_on,
        drift=config.drift,
        part=cli.share,
        merge=merge,
        suite=suite_of(config),
    )


def _save_config(cli: FitCLI, directory: RunDirectory) -> None:
    with directory.manifest.writing(directory.config) as temporary:
        cli.parser.save(cli.config, temporary, skip_unset=False, overwrite=True, multifile=False)
