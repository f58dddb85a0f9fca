"""The recovery scopes, each a LightningModule."""

from recon.scopes.base import Scope
from recon.scopes.distillation import BlockDistillation, SubmoduleDistillation
from recon.scopes.full import FullRetraining
from recon.scopes.matrix import MatrixReconstruction
from recon.scopes.pretraining import Pretraining

__all__ = [
    "BlockDistillation",
    "FullRetraining",
    "MatrixReconstruction",
    "Pretraining",
    "Scope",
    "SubmoduleDistillation",
]
