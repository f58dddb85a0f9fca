"""Allocations: how many of a model's zeros each block gets. One file each; `base.py` holds the contract."""

from recon.allocation.base import Allocation, spread
from recon.allocation.errors import EqualErrors
from recon.allocation.owl import OWL

__all__ = ["OWL", "Allocation", "EqualErrors", "spread"]
