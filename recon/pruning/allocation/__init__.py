"""Allocations: how many of a model's zeros each block gets. One file each; `base.py` holds the contract."""

from recon.pruning.allocation.base import Allocation, spread
from recon.pruning.allocation.errors import EqualErrors
from recon.pruning.allocation.owl import OWL

__all__ = ["OWL", "Allocation", "EqualErrors", "spread"]
