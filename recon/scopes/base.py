"""What the four recovery scopes share: the model they repair, the masks they keep, the data they see."""

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from transformers import PreTrainedModel

from recon.basics.run_paths import RunPaths
from recon.calibration.storage import ON_DEVICE, ON_HOST, Storage
from recon.data import TokenData
from recon.distributed.part import Share
from recon.evaluation.perplexity import Evaluation
from recon.models.anatomy import Anatomy
from recon.models.experts import ExpertStatistics
from recon.models.loading import ModelSource, empty
from recon.models.offload.blocks import OffloadedBlocks
from recon.models.offload.opening import Offload, open_offloaded
from recon.models.replay import Forms, Replay
from recon.models.windows import Window
from recon.profiling.phases import PhaseName, Phases
from recon.pruning.interleaved import Interleaved
from recon.pruning.masks import Masks
from recon.pruning.start_weights import Start, apply, written
from recon.scopes.enforcement import MaskEnforcer
from recon.scopes.exact import solve_all
from recon.scopes.optimization import LRSchedulerRecipe, OptimizerRecipe
from recon.scopes.own_batches import OwnBatches
from recon.scopes.starts import StartName, carry_over, given_start
from recon.scopes.step_losses import StepLosses
from recon.scopes.tally import Tally
from recon.scopes.trainer_options import EVERYWHERE, IN_WINDOWS, TrainerOption, refuse


class Scope(L.LightningModule, ABC):
    """A way to repair a pruned model, as a LightningModule.

    The order of calls is `require_trainer(trainer)`, `load(data)`, `prepare(data, masks)`,
    `trainer.fit(scope, datamodule=scope.fit_data(data))`. Afterwards `model` holds the recovered weights, and
    `masks.check(model)` passes.

    Args:
        name: `bundled`, a directory in Hugging Face format, a name on the hub, or `random`.
        shape: For `random`: the model's configuration, `model_type` included.
        dtype: Precision of the weights in memory, in which everything is computed: float32, bfloat16, float16, or
            `auto` for the stored one. If null float32, in local scopes on a GPU the stored one: they train in float32.
        revision: Commit, tag or branch of a hub model.
        tokenizer: Where the tokenizer is, if not with the model; for `random` the bundled one by default.
        trust_remote_code: Run code that comes with the model. Off, because it can do anything.
        save_dtype: Precision of the written model: float32, bfloat16 or float16; if null that of the source's files,
            so that a bf16 model stays one; for `random` that of `dtype`. What is measured is the written model,
            computed in `dtype` as the dense one is.
        epochs: Passes over the calibration sequences; of each window in the local scopes.
        start: Surviving weights at the start: `pruned`, as they were in the dense model; `moved`, as
            a criterion that moves them (SparseGPT, ADMM, ALPS) left them; `exact`, those that best reproduce each
            matrix's outputs by itself, as the matrix scope finds them, but to about 1 % of the least error; `auto`, in
            submodule and block, for each window the one of `exact` and `pruned` with the lower held-out error; `run`,
            those of another run, which `--from` names and which gives the masks, too.
        offload: Where the model is: `none`, on the device; `host`, in the host's memory, its blocks on the device
            while needed; `disk`, in its safetensors files, from which blocks are read. With the last two local scopes
            need room for one window on the device, full retraining for the whole model only during the fit.
    """

    scope: ClassVar[str]
    """What reports call it: matrix, submodule, block or full."""

    by_window: ClassVar[bool] = False
    """Whether the model is recovered window by window."""

    def __init__(
        self,
        name: str = "bundled",
        shape: dict[str, Any] | None = None,
        dtype: str | None = None,
        revision: str | None = None,
        tokenizer: str | None = None,
        trust_remote_code: bool = False,
        save_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        epochs: int = 1,
        start: StartName = "pruned",
        offload: Offload = "none",
    ) -> None:
        super().__init__()
        if epochs < 1:
            raise ValueError(f"model.epochs must be at least 1, got {epochs}; give --model.epochs 1")
        self.source = ModelSource(name, shape, dtype, revision, tokenizer, trust_remote_code)
        self.save_dtype, self.epochs = save_dtype, epochs
        self.start: StartName = start
        self.offload: Offload = offload
        self.offloaded: OffloadedBlocks | None = None  # of a model that is not on the device
        self.forms: Forms | None = None  # in which its blocks return, once they were tried out
        self._storage = ON_DEVICE if offload == "none" else ON_HOST
        self.start_weights: Mapping[str, torch.Tensor] | None = None  # of every mask; None for the dense survivors
        self.start_seconds = 0.0  # what it took to solve for them, in this start of the run
        self.tally, self.losses, self.phases, self.masks = Tally(), StepLosses(), Phases(), Masks({})
        self.experts = ExpertStatistics()
        self.model: PreTrainedModel
        self.dtype_to_save: torch.dtype
        self.data: TokenData
        self.directory: Path | None = None
        self.evaluation: Evaluation | None = None  # of the recovered model, where only the fit holds it in parts

    @property
    def label(self) -> str:
        """What a table calls this scope; the scope's name unless an option changes what it is."""
        return self.scope

    @property
    @abstractmethod
    def train_tokens(self) -> int:
        """Calibration tokens of training steps, in all processes and starts, once per pass; known after the fit."""

    @property
    @abstractmethod
    def max_epochs(self) -> int:
        """How many Lightning epochs the fit takes."""

    @property
    def windows(self) -> Sequence[Window]:
        """The windows that are recovered one by one; none in a scope without windows."""
        return ()

    @property
    def own_windows(self) -> Sequence[Window]:
        """The windows that this process recovers."""
        return ()

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """Held-out errors of each recovered window, and more; none in a scope without windows."""
        return {}

    @property
    def rates(self) -> dict[str, dict[str, Any]]:
        """Kind of window -> its searched learning rate and all that was tried; none by default."""
        return {}

    @property
    def storage(self) -> Storage:
        """Where hidden states are kept between two passes; if that is on disk, in the run's directory."""
        return replace(self._storage, directory=self.directory)

    @property
    def loads_whole(self) -> bool:
        """Whether `load` gives the whole model, so that it can be pruned and measured."""
        return True

    @property
    def forward_batch_size(self) -> int:
        """Sequences per forward pass in which nothing is trained."""
        return self.data.batch_size

    @property
    def progress(self) -> str:
        """Where the fit is, in a few words."""
        return f"epoch {self.trainer.current_epoch + 1}/{self.max_epochs}"

    @property
    def maskable(self) -> list[str]:
        """Names of the parameters that have a mask, or will have one before the fit ends."""
        return list(self.masks)

    @abstractmethod
    def enforced(self) -> Masks:
        """The masks that hold at this moment; all of them when the fit has ended."""

    def require_strategy(self, trainer: L.Trainer) -> None:
        """Refuse a strategy that this scope cannot use.

        Raises:
            ValueError: Here if the strategy has several processes train one window.
        """
        if trainer.world_size > 1:
            raise ValueError(
                f"the {self.scope} scope runs in one process, got trainer.devices and trainer.num_nodes that make "
                f"{trainer.world_size}; choose strategies/window_parallel, where each process has its own windows, or "
                f"set both to 1, or retrain the whole model with scopes/full"
            )

    def require_independent(self, what: str) -> None:
        """Refuse options that make windows depend on each other, which `what` needs; there are none here."""

    def divide(self, share: Share, assembles: bool) -> None:
        """Say, before `prepare`, which windows this process recovers, and whether it has all of them in the end."""

    def missing(self, windows: Sequence[Window]) -> list[Window]:
        """Those of `windows` that are not written yet."""
        return []

    def recall(self, windows: Sequence[Window]) -> None:
        """Take over the seconds recorded with those of `windows` that are written; there are none here."""

    def settle(self, device: torch.device) -> None:
        """Settle options that depend on the device, before anything is loaded."""

    @property
    def paths(self) -> RunPaths | None:
        """The places of the run's products; None without a directory."""
        return None if self.directory is None else RunPaths(self.directory)

    def require_model(self, anatomy: Anatomy, pruned: Collection[str]) -> None:
        """Refuse a loaded model that the options of this scope do not fit, before it is pruned; any model fits here.

        Args:
            anatomy: The blocks of the model.
            pruned: Names of the parameters to be pruned.
        """

    def refused_options(self) -> tuple[TrainerOption, ...]:
        """Options of a trainer that this scope does not honour."""
        return EVERYWHERE + IN_WINDOWS

    def require_trainer(self, trainer: L.Trainer) -> None:
        """Refuse a trainer whose strategy or options this scope cannot use, before anything is loaded.

        Raises:
            ValueError: Naming the option, its value and the cure.
        """
        self.require_strategy(trainer)
        refuse(self.refused_options(), trainer, self.scope)

    def choose_optimizer(self, optimizer: OptimizerRecipe | None, lr_scheduler: LRSchedulerRecipe | None) -> None:
        """Train by another optimizer or learning-rate schedule than the scope's own.

        Args:
            optimizer: Makes the optimizer from the parameters that learn; the scope's own if None.
            lr_scheduler: Makes the schedule from the optimizer; the scope's own if None.

        Raises:
            ValueError: Here if one is given: one optimizer serves all windows in turn, its schedule begins anew with
                each window, and its state is dropped when a window ends.
        """
        if given := [recipe for recipe in (optimizer, lr_scheduler) if recipe is not None]:
            raise ValueError(
                f"--optimizer and --lr_scheduler are for full retraining, got {given[0]} with the {self.scope} scope, "
                f"whose schedule begins anew with each window; leave them out and set the scope's own options, such as "
                f"model.lr, or choose scopes/full"
            )

    def configure_callbacks(self) -> list[Callback]:
        """What correct results need, whatever callbacks the trainer has: masks are enforced, once."""
        has_one = any(isinstance(one, MaskEnforcer) for one in self.trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]
        return [] if has_one else [MaskEnforcer()]

    def fit_data(self, data: TokenData) -> L.LightningDataModule:
        """The data module of `trainer.fit`: the hooks of `data`, with batches of this scope's own."""
        return OwnBatches(data, self.train_dataloader)

    def load(self, data: TokenData) -> None:
        """Load the dense model, and give `data` its tokenizer."""
        self.forms = None
        if self.offload == "none":
            self.model, data.tokenizer = self.source.load()
        else:
            dense = None if self.paths is None else self.paths.dense
            self.offloaded = open_offloaded(self.source, self.offload, self.device, dense)
            object.__setattr__(self, "model", self.offloaded.model)  # not as a child, which Lightning would move
            data.tokenizer = self.source.tokenizer_for(self.model)
        self.dtype_to_save = self._dtype_to_save()

    def _dtype_to_save(self) -> torch.dtype:
        return self.source.stored_dtype() if self.save_dtype is None else getattr(torch, self.save_dtype)

    def result(self) -> tuple[PreTrainedModel, dict[str, torch.Tensor] | None]:
        """The recovered model in the precision to save, after the fit, and its weights if it is without them."""
        if self.offloaded is None or self.offloaded.disk_weights is None:
            as_stored = self.model.dtype == self.dtype_to_save
            return self.model if as_stored else self.model.to(self.dtype_to_save), None  # pyright: ignore[reportArgumentType]
        assert self.directory is not None
        state = self.offloaded.state(self.dtype_to_save, self.directory)
        model = empty(type(self.model), self.model.config, self.dtype_to_save)
        model.generation_config = self.model.generation_config
        return model, state

    def open_replay(self) -> Replay:
        """The blocks of the model, one by one, on the device that this module is on; tried out the first time."""
        if self.offloaded is not None:
            self.offloaded.move_to(self.device)
        replay = Replay(self.model, Anatomy.of(self.model), self.offloaded, self.forms)
        replay.experts = self.experts
        self.forms = replay.forms
        return replay

    def check(self, masks: Masks) -> None:
        """Look for pruned weights that are not zero, wherever the model is.

        Raises:
            ValueError: Naming the first parameter that has one.
        """
        if self.offloaded is None or self.offloaded.disk_weights is None:
            return masks.check(self.model)
        for block in self.offloaded.anatomy.blocks:
            if names := [name for name in block.parameters() if name in masks]:
                self.offloaded.onload(block.index)
                masks.subset(names).check(self.model)

    def prepare(
        self,
        data: TokenData,
        masks: Masks,
        directory: Path | None = None,
        moved: Mapping[str, torch.Tensor] | None = None,
        interleaved: Interleaved | None = None,
    ) -> None:
        """Say what to train on and which weights survive; solve for the exact start, if it is to be that.

        Args:
            data: Calibration and validation tokens; its tokenizer is set.
            masks: Which weights of the loaded model survive.
            directory: Where finished parts may be written, so that a killed run can go on; nowhere if None.
            moved: The weights to start from, for `start: moved` those that the criterion left, for `start: run` all
                weights of that run.
            interleaved: Chooses the masks along with recovery, which `masks` then are still without; local scopes only.

        Raises:
            ValueError: If the masks belong to another model, or there are no weights to start from.
        """
        masks.validate_for(self.model)
        self.data, self.masks, self.directory = data, masks, directory
        if interleaved is None:
            self.start_weights = given_start(self.start, moved)
        if self.start == "exact" and masks:
            self.start_weights = self.solve_start()

    def solve_start(self) -> Mapping[str, torch.Tensor] | None:
        """The exact solution of every matrix: from the run's directory, or solved for now and left there."""
        paths, found = self.paths, dict[str, torch.Tensor]()
        if paths is not None and paths.manifest.is_intact(paths.start):
            self.tally.at_least = True  # unless a checkpoint has the seconds of the start that solved it
        else:
            tokens = self.data.tokens("train")  # to tokenise is no part of it
            self.phases.enter(PhaseName.START)
            started = time.monotonic()
            with ExitStack() as stack:
                like = {name: self.model.get_parameter(name) for name in self.masks}
                to_file = paths and written(paths.start, like, paths.manifest.writing)
                sink = stack.enter_context(to_file) if to_file else found.__setitem__
                solve_all(self.open_replay(), tokens, self.masks, sink, self.forward_batch_size, self.storage)
            self.start_seconds = time.monotonic() - started
        return found if paths is None else Start(paths.start, self.masks)

    def begin_from_start(self, masks: Masks) -> None:
        """Prune the weights of `masks` and give the survivors, and what is not pruned, what recovery starts from."""
        apply(self.model, masks, self.start_weights)
        if self.start == "run" and self.start_weights is not None:
            carry_over(
                self.model, [name for name, _ in self.model.named_parameters() if name not in masks], self.start_weights
            )

    def setup(self, stage: str) -> None:
        """Tell the trainer how long the fit is: the scope knows its windows and epochs."""
        if stage == "fit":
            self.trainer.fit_loop.max_epochs = self.max_epochs

    def log_loss(self, name: str, loss: torch.Tensor, where: str, **options: Any) -> None:
        """Log the loss of a step that trains, and stop the run if it is no number.

        That is found when a loss is written to a logger, each `trainer.log_every_n_steps` steps, with the last batch of
        an epoch, and before a checkpoint: to ask at every step would make the host wait for the device each time.

        Args:
            name: What the loss is called.
            loss: Of this batch.
            where: Of what it is the loss, for the message.
            **options: As `LightningModule.log` takes them.

        Raises:
            FloatingPointError: If this loss or one before it is NaN or infinite, naming the first.
        """
        self.losses.note(name, loss, where)
        every: int = self.trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        if self.trainer.is_last_batch or (every and (self.trainer.global_step + 1) % every == 0):
            # From the host: Lightning asks for the latest value of a progress bar's metric after every batch.
            self.log(name, self.losses.finite()[-1], **options)

    def release(self) -> None:
        """Let go of the model, which is written, and of all that holds a part of it."""
        del self.model
        self.offloaded = None

    def break_off(self) -> None:
        """End what goes on beside a fit that has failed; nothing does here."""

    def on_fit_end(self) -> None:
        """Refuse a result that violates its masks, whichever callbacks there were.

        Raises:
            ValueError: Naming the first parameter with a pruned weight that is not zero.
        """
        self.check(self.masks)
