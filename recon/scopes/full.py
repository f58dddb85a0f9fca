"""Full retraining: the pruned model as a whole, on next-token prediction or the dense model's logits."""

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recon.anatomy import Anatomy
from recon.data import TokenData
from recon.masks import Masks
from recon.scopes.base import Scope, check_finite, warmup_and_linear_decay


class FullRetraining(Scope):
    """Retrain the whole pruned model under its masks.

    The module stays in evaluation mode: dropout is off, as it is in the local scopes.

    Args:
        epochs: Passes over the calibration sequences.
        loss: `cross_entropy` on the next token, or `distillation`: KL divergence from the dense model's
            next-token distribution, which keeps a second copy of the model in memory.
        temperature: Softens both distributions in distillation.
        train: What learns: `blocks` leaves embeddings and head as they are, `all` trains them too.
        lr: Peak learning rate of AdamW.
        weight_decay: AdamW's weight decay.
        betas: AdamW's averaging coefficients.
        warmup: Share of the steps with a rising learning rate; it falls linearly to zero afterwards.
        **options: Which model: see `Scope`.
    """

    scope = "full"

    def __init__(
        self,
        epochs: int = 4,
        loss: Literal["cross_entropy", "distillation"] = "cross_entropy",
        temperature: float = 1.0,
        train: Literal["blocks", "all"] = "blocks",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(epochs=epochs, **options)
        self.loss, self.temperature, self.train_what = loss, temperature, train
        self.lr, self.weight_decay, self.betas, self.warmup = lr, weight_decay, betas, warmup
        self._teacher: list[nn.Module] = []  # a list, so that Lightning does not see its parameters

    @property
    def label(self) -> str:
        """Distillation is called what it is."""
        return "full (distillation)" if self.loss == "distillation" else "full"

    @property
    def max_epochs(self) -> int:
        """Epochs, as asked for."""
        return self.epochs

    @property
    def train_tokens(self) -> int:
        """Calibration tokens times epochs."""
        return self.data.tokens("train").numel() * self.epochs

    def enforced(self) -> Masks:
        """All masks, from before the first step."""
        return self.masks

    def prepare(self, data: TokenData, masks: Masks, directory: Path | None = None) -> None:
        """As `Scope.prepare`; the masks are applied here, before an optimizer copies the weights."""
        super().prepare(data, masks, directory)
        if self.loss == "distillation":
            self._teacher = [copy.deepcopy(self.model).requires_grad_(False)]
        masks.apply(self.model)
        if self.train_what == "blocks":
            self.model.requires_grad_(False)
            for block in Anatomy.of(self.model).blocks:
                block.module.requires_grad_(True)

    def on_fit_start(self) -> None:
        """Put the teacher where the model is."""
        for teacher in self._teacher:
            teacher.to(self.device)

    def on_fit_end(self) -> None:
        """Check the masks, and let go of the teacher: what follows needs one model."""
        super().on_fit_end()
        self._teacher.clear()

    def train_dataloader(self):
        """Calibration batches."""
        return self.data.train_dataloader()

    def val_dataloader(self):
        """Held-out batches."""
        return self.data.val_dataloader()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean loss per predicted token."""
        loss = self._loss(batch["input_ids"])
        check_finite(loss, f"full retraining, step {self.global_step}, batch {batch_idx}")
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Mean held-out loss per predicted token."""
        loss = self._loss(batch["input_ids"])
        check_finite(loss, f"full retraining, step {self.global_step}, held-out batch {batch_idx}")
        self.log("held_out_loss", loss, prog_bar=True, sync_dist=True)

    def configure_optimizers(self):
        """AdamW with warm-up and linear decay."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        return {
            "optimizer": optimizer,
            "lr_scheduler": warmup_and_linear_decay(optimizer, steps, self.warmup),
        }

    def _loss(self, input_ids: Tensor) -> Tensor:
        logits = self.model(input_ids=input_ids, use_cache=False).logits[:, :-1].float().flatten(0, 1)
        if self.loss == "cross_entropy":
            return F.cross_entropy(logits, input_ids[:, 1:].flatten())
        with torch.no_grad():
            target = self._teacher[0](input_ids=input_ids, use_cache=False).logits[:, :-1].float().flatten(0, 1)
        t = self.temperature
        student, teacher = F.log_softmax(logits / t, dim=-1), F.log_softmax(target / t, dim=-1)
        return F.kl_div(student, teacher, log_target=True, reduction="batchmean") * t * t
