"""The recovery scopes, each a LightningModule."""

from recon.scopes.base import Scope
from recon.scopes.full import FullRetraining
from recon.scopes.pretraining import Pretraining

__all__ = ["FullRetraining", "Pretraining", "Scope"]
