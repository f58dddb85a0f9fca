"""Full retraining: the pruned model as a whole, on next-token prediction or the dense model's logits."""

import copy
import logging
import math
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from recon.basics.run_paths import RunPaths
from recon.basics.units import in_bytes
from recon.data import TokenData
from recon.distributed.parameters import FROZEN, frozen_copies, gather, round_working_copies
from recon.distributed.ranks import rank
from recon.distributed.strategies import FullyShardedStrategy, ZeroStrategy
from recon.evaluation.perplexity import evaluate
from recon.models.anatomy import Anatomy
from recon.models.loading import empty
from recon.models.offload.opening import onloaded
from recon.pruning.interleaved import Interleaved
from recon.pruning.masks import Masks
from recon.scopes.base import Scope
from recon.scopes.best import VALIDATES_NEXT, BestWeights, ends_unmeasured, validate_now, validates_next
from recon.scopes.enforcement import require_zero_keeping
from recon.scopes.full_rate import rate_for
from recon.scopes.full_requirements import require_clipping_by_norm, require_one_model, require_together
from recon.scopes.lora import DEFAULT_LORA, Lora, attach, merge, merge_state, round_merged
from recon.scopes.losses import ModelLoss, check_finite
from recon.scopes.model_loss import LOGITS_MEMORY, chunk_rows, logits_bytes, model_loss
from recon.scopes.optimization import (
    LearningRate,
    LRSchedulerRecipe,
    OptimizerRecipe,
    adamw,
    require_buildable,
    require_rates,
    warmup_and_linear_decay,
)
from recon.scopes.tally import TALLY
from recon.scopes.trainable import Parameters, chosen
from recon.scopes.trainer_options import EVERYWHERE, TrainerOption

log = logging.getLogger("recon")


class FullRetraining(Scope):
    """Retrain the whole pruned model under its masks, on one device or sharded over many.

    The module stays in evaluation mode: dropout is off, as it is in the local scopes.

    Args:
        epochs: Passes over the calibration sequences.
        loss: `cross_entropy` on the next token, or `distillation`: KL divergence from the dense model's
            next-token distribution, which keeps a second copy of the model in memory, sharded as the first.
        temperature: Softens both distributions in distillation.
        train: Where it learns: `blocks` leaves embeddings and head as they are, `all` trains them too.
        parameters: What learns there: `all`; `weights`, the matrices of linear maps in the blocks; `vectors`, norms and
            biases; `routers`; `lora`, low-rank updates of the pruned matrices, which are merged into them in the end.
        lora: Rank and alpha of these updates.
        lr: Peak learning rate of AdamW, `auto` for one by the model's width; another `--optimizer` has its own.
        weight_decay: AdamW's weight decay.
        betas: AdamW's averaging coefficients.
        warmup: Share of the steps with a rising learning rate; it falls linearly to zero afterwards. Another
            `--lr_scheduler` takes the place of both.
        gradient_checkpointing: Keep only the inputs of blocks for the backward pass. The rest is computed again.
        logits_memory: Most memory of a batch's fp32 logits. The loss of a batch with more is computed in chunks of
            tokens whose logits take as much, if the model's logits are the output of a linear head as it is. A chunk
            of cross-entropy needs twice this memory, one of distillation up to four times.
        keep_best: Return the weights of the lowest held-out loss, which is measured after each epoch or each
            `trainer.val_check_interval`, and in the end. A run directory then holds them in a file.
        partitioned: For models larger than a process's memory: load them partitioned, by ZeRO-3. Needs `offload: disk`,
            or `--masks`, `--baselines false` and a start other than `exact`, for pruning them takes whole models.
        **options: Which model: see `Scope`.
    """

    scope = "full"

    def __init__(
        self,
        epochs: int = 4,
        loss: ModelLoss = "cross_entropy",
        temperature: float = 1.0,
        train: Literal["blocks", "all"] = "blocks",
        parameters: Parameters = "all",
        lora: Lora = DEFAULT_LORA,
        lr: LearningRate = "auto",
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup: float = 0.1,
        gradient_checkpointing: bool = False,
        logits_memory: str = LOGITS_MEMORY,
        keep_best: bool = True,
        partitioned: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(epochs=epochs, **options)
        require_together(train, parameters, partitioned, self.start, self.offload)
        require_rates(lr, weight_decay, betas, warmup)
        if not 0 < temperature < math.inf:
            raise ValueError(f"model.temperature must be above 0 and finite, got {temperature}; 1 is the default")
        self.loss: ModelLoss = loss
        self.temperature, self.train_what, self.lora = temperature, train, lora
        self.which_parameters: Parameters = parameters
        self.lr: LearningRate = lr
        self.weight_decay, self.betas, self.warmup = weight_decay, betas, warmup
        self.gradient_checkpointing, self.partitioned, self.keep_best = gradient_checkpointing, partitioned, keep_best
        self.logits_memory = in_bytes(logits_memory)
        self._chunk_rows: int | None = None  # predictions whose logits exist at a time; all if None
        self._best: BestWeights | None = None
        self._resumed = self._validates_next = False  # a checkpoint was loaded; a validation was due when it was saved
        self._optimizer, self._lr_scheduler = None, None  # those that were chosen in place of AdamW and its schedule
        self._teacher: list[Any] = []  # a list, so that Lightning does not see its parameters
        self._frozen: dict[str, Tensor] = {}
        self._adapters: list[str] = []
        self._kind: type[PreTrainedModel]
        self._gathered: dict[str, Tensor] | None = None
        self._train_tokens = 0

    @property
    def label(self) -> str:
        """Says what is not the default: distillation, and which parameters learn."""
        said = ["distillation"] if self.loss == "distillation" else []
        said += [self.which_parameters] if self.which_parameters != "all" else []
        return f"full ({', '.join(said)})" if said else "full"

    @property
    def max_epochs(self) -> int:
        """Epochs, as asked for."""
        return self.epochs

    @property
    def train_tokens(self) -> int:
        """See `Scope.train_tokens`; sequences that fill up the last batches of several processes are counted, too."""
        return self._train_tokens

    @property
    def loads_whole(self) -> bool:
        """Unless it is to be loaded in parts, and never block by block."""
        return not self.partitioned or self.offload != "none"

    def enforced(self) -> Masks:
        """All masks, from before the first step."""
        return self.masks

    def require_strategy(self, trainer: L.Trainer) -> None:
        """Any that trains one model in all processes; it has to partition weights if the model is loaded in parts.

        Raises:
            ValueError: If the strategy does not.
        """
        require_one_model(trainer, self.scope, self.partitioned)

    def refused_options(self) -> tuple[TrainerOption, ...]:
        """Those that no scope honours."""
        return EVERYWHERE

    def require_trainer(self, trainer: L.Trainer) -> None:
        """As `Scope.require_trainer`; DeepSpeed clips no gradient by its value."""
        super().require_trainer(trainer)
        require_clipping_by_norm(trainer)

    def choose_optimizer(self, optimizer: OptimizerRecipe | None, lr_scheduler: LRSchedulerRecipe | None) -> None:
        """As `Scope.choose_optimizer`; any optimizer that keeps zeros, and any schedule.

        Raises:
            ValueError: If the optimizer moves weights whose gradient is zero.
        """
        require_buildable(optimizer, lr_scheduler)
        if optimizer is not None:
            require_zero_keeping(optimizer.kind)
            self.lr = optimizer.options.get("lr", self.lr)
            log.info(f"{optimizer} has its own options, in place of model.lr, model.weight_decay and model.betas")
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler

    @property
    def optimizer_kind(self) -> type[torch.optim.Optimizer]:
        """The class of its optimizer."""
        return torch.optim.AdamW if self._optimizer is None else self._optimizer.kind

    def fit_data(self, data: TokenData) -> L.LightningDataModule:
        """`data` itself: it trains on its batches."""
        return data

    def load(self, data: TokenData) -> None:
        """As `Scope.load`; of a partitioned model only the shape."""
        if self.loads_whole:
            return super().load(data)
        self.model = self.source.skeleton()
        data.tokenizer = self.source.tokenizer_for(self.model)
        self.dtype_to_save = self._dtype_to_save()

    def prepare(
        self,
        data: TokenData,
        masks: Masks,
        directory: Path | None = None,
        moved: Mapping[str, Tensor] | None = None,
        interleaved: Interleaved | None = None,
    ) -> None:
        """As `Scope.prepare`; the model is pruned here, before an optimizer or a strategy copies the weights."""
        super().prepare(data, masks, directory, moved, interleaved)
        if (offloaded := self.offloaded) is not None:
            self.release()
            self.model = self.source.skeleton() if self.partitioned else onloaded(offloaded, self.source)
        if not self.partitioned:
            if self.loss == "distillation":
                self._teacher = [copy.deepcopy(self.model).requires_grad_(False)]
            self._make_ready()

    def configure_model(self) -> None:
        """Load a partitioned model, or shard a loaded one, as the strategy has it."""
        strategy = self.trainer.strategy
        if self.partitioned:
            assert isinstance(strategy, ZeroStrategy)
            self.model = strategy.load(self.source.model)
            if self.loss == "distillation":
                self._teacher = [strategy.load(self.source.model).requires_grad_(False)]
            self._make_ready()
        self._kind = type(self.model)
        if isinstance(strategy, ZeroStrategy) and strategy.rounds(self.dtype_to_save):
            self._frozen = frozen_copies(self.model, self.dtype_to_save, keep=rank() == 0)
        if isinstance(strategy, FullyShardedStrategy):
            for model in (self.model, *self._teacher):
                strategy.shard(model, [block.module for block in Anatomy.of(model).blocks])

    def _make_ready(self) -> None:
        self.begin_from_start(self.masks)
        anatomy = Anatomy.of(self.model)
        blocks, parameters = anatomy.blocks, dict(self.model.named_parameters())
        if self.train_what == "blocks":
            parameters = {name: one for block in blocks for name, one in block.parameters().items()}
        learning = chosen(parameters, blocks, self.which_parameters)
        self.model.requires_grad_(False)
        for name in learning:
            parameters[name].requires_grad_(True)
        if self.which_parameters == "lora":
            self._adapters = attach(self.model, self.masks, self.masks, self.lora, self.data.seed)
        if self.gradient_checkpointing:
            for block in blocks:  # not the model's own way, which needs the training mode and with it dropout
                block.module.forward = partial(checkpoint, block.module.forward, use_reentrant=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what DeepSpeed has only rounded, and the cost so far.

        Raises:
            FloatingPointError: If a loss since the last look is no number; nothing is saved then.
        """
        self.losses.finite()
        checkpoint[FROZEN] = self._frozen
        spent = self.tally.state()
        checkpoint[TALLY] = spent | {"seconds": spent["seconds"] + self.start_seconds}
        checkpoint[VALIDATES_NEXT] = validates_next(self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from the cost so far.

        Raises:
            ValueError: If the checkpoint has no cost.
        """
        if TALLY not in checkpoint:
            raise ValueError(
                f"a checkpoint needs the cost so far, got one without `{TALLY}`, made by another version of recon; use "
                f"that version, or delete the checkpoints to begin anew"
            )
        self.tally.go_on(**checkpoint[TALLY])
        self._resumed, self._validates_next = True, checkpoint[VALIDATES_NEXT]

    def on_train_start(self) -> None:
        """Find the best weights of earlier starts, and measure the held-out loss that the last one was about to."""
        if self.keep_best:
            self._best = BestWeights(RunPaths(self.directory or Path(tempfile.mkdtemp(prefix="recon-"))).best)
            self._best.begin(self.trainer, self._resumed)
            if self._validates_next:
                validate_now(self.trainer)

    def on_validation_end(self) -> None:
        """Keep the weights if they are the best so far."""
        if self._best is not None and not self.trainer.sanity_checking:
            loss = self.trainer.callback_metrics["held_out_loss"].item()
            self._best.offer(loss, self.trainer.global_step, self.model)

    def on_train_batch_end(self, *_: Any) -> None:
        """Measure the held-out loss after the last step, too, where `trainer.max_steps` ends an epoch early."""
        if self._best is not None and ends_unmeasured(self.trainer):
            validate_now(self.trainer)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Note that the batches so far make a step."""
        self.tally.step()

    def on_fit_start(self) -> None:
        """Put the teacher where the model is, and find out if the loss can be computed in chunks."""
        strategy = self.trainer.strategy
        frozen = strategy.frozen if isinstance(strategy, ZeroStrategy) else lambda teacher: teacher.to(self.device)
        self._teacher = [frozen(teacher) for teacher in self._teacher]
        if logits_bytes(self.model, self.data.batch_size, self.data.seq_len) > self.logits_memory:
            with self.trainer.precision_plugin.forward_context():
                self._chunk_rows = chunk_rows([self.model, *self._teacher], self.logits_memory, self.device)

    def on_fit_end(self) -> None:
        """Merge adapters, check the masks, let go of the teacher, and gather what the strategy has sharded.

        Where the last weights are not the best, those of rank 0 become the best; of a partitioned model, of all ranks.
        """
        self._train_tokens = self.tally.tokens()
        strategy = self.trainer.strategy
        sharded = isinstance(strategy, ZeroStrategy | FullyShardedStrategy)
        best = None if self._best is None else self._best.other_than(self.trainer.global_step)
        if best is not None and (self.partitioned or (not sharded and rank() == 0)):
            best.restore(self.model)
        if not sharded:
            merge(self.model, self._adapters)
        super().on_fit_end()
        self._teacher.clear()
        if sharded:
            self._gather(best)
        if isinstance(strategy, ZeroStrategy):
            strategy.let_go()
        if self._best is not None and self.directory is None:
            self._best.forget()
            self._best.path.parent.rmdir()
        self._best = None

    def _gather(self, best: BestWeights | None) -> None:
        if self.partitioned:  # not loaded whole to be measured, so it is rounded here as it will be written
            round_working_copies(self.model, self.dtype_to_save, exact=self._adapters)
            round_merged(self.model, self._adapters, self.dtype_to_save)
            batches, split = self.data.evaluation_dataloader(), self.data.evaluate_on
            self.evaluation = evaluate(self.model, batches, split, device=self.device)
        where = self.directory or Path(self.trainer.default_root_dir)
        self._gathered = gather(self.model, self.dtype_to_save, where, rank() == 0, exact=self._adapters)
        for name in self._gathered.keys() & self._frozen.keys():
            self._gathered[name].copy_(self._frozen[name])  # in place: tied ones stay tied
        if self._gathered:
            if best is not None:
                best.restore_state(self._gathered)
            merge_state(self.model, self._adapters, self._gathered)

    def result(self) -> tuple[PreTrainedModel, dict[str, Tensor] | None]:
        """The recovered model; gathered, if a strategy had sharded it."""
        if self._gathered is None:
            return super().result()
        return empty(self._kind, self.model.config, self.dtype_to_save), self._gathered

    def train_dataloader(self):
        """Calibration batches."""
        return self.data.train_dataloader()

    def val_dataloader(self):
        """Held-out batches."""
        return self.data.val_dataloader()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean loss per predicted token."""
        self.tally.count(batch["input_ids"].numel())
        loss = self._loss(batch["input_ids"])
        where = f"full retraining, step {self.global_step}, batch {batch_idx}"
        self.log_loss("loss", loss, where, prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Mean held-out loss per predicted token."""
        loss = self._loss(batch["input_ids"])
        check_finite(loss, f"full retraining, step {self.global_step}, held-out batch {batch_idx}")
        self.log("held_out_loss", loss, prog_bar=True, sync_dist=True)

    @property
    def _steps_fused(self) -> bool:
        """On CUDA, and where ZeRO steps on the host. Elsewhere rounding would differ from that of the local scopes."""
        strategy = self.trainer.strategy
        on_host = isinstance(strategy, ZeroStrategy) and strategy.offloads_optimizer
        return on_host or strategy.root_device.type == "cuda"

    def configure_optimizers(self):
        """AdamW with warm-up and linear decay, or what was chosen."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if self._optimizer is None:
            self.lr = rate_for(Anatomy.of(self.model), self.loss, self.start) if self.lr == "auto" else self.lr
            optimizer = adamw(trained, self._steps_fused, self.lr, betas=self.betas, weight_decay=self.weight_decay)
        else:
            optimizer = self._optimizer(trained)
        if self._lr_scheduler is not None:
            return {"optimizer": optimizer, "lr_scheduler": self._lr_scheduler(optimizer)}
        steps = int(self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": warmup_and_linear_decay(optimizer, steps, self.warmup)}

    def _loss(self, input_ids: Tensor) -> Tensor:
        teacher = self._teacher[0] if self._teacher else None
        rows = self._chunk_rows if logits_bytes(self.model, *input_ids.shape) > self.logits_memory else None
        return model_loss(self.model, input_ids, self.loss, teacher, self.temperature, rows)
