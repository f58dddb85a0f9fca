"""The learning rate of full retraining, where none is given: inversely proportional to the width of the model."""

import logging

from recon.models.anatomy import Anatomy
from recon.scopes.losses import ModelLoss
from recon.scopes.starts import StartName

log = logging.getLogger("recon")

FROM_A_RUN = 0.5
"""Factor for weights that another run has recovered: they need smaller steps than pruned ones."""

TIMES_WIDTH: dict[ModelLoss, float] = {"cross_entropy": 0.25, "distillation": 0.5}
"""Peak rate of AdamW times the width, by loss; measured in the README of the scopes."""


def rate_for(anatomy: Anatomy, loss: ModelLoss, start: StartName) -> float:
    """Choose the peak learning rate of AdamW.

    An update of AdamW moves each weight by about the rate, and an output by about the rate times the number of inputs:
    wider models need smaller ones (maximal update parametrisation, arXiv 2203.03466).

    Args:
        anatomy: Blocks of the model; its weights may be partitioned.
        loss: Loss of the training.
        start: Weights that it starts from.
    """
    first = next(iter(anatomy.prunable().values()))  # reads the hidden state
    rate = TIMES_WIDTH[loss] / first.shape[1] * (FROM_A_RUN if start == "run" else 1.0)
    log.info(f"learning rate {rate:.2e}, by the width of the model")
    return rate
