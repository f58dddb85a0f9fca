"""Refinements: better masks from those of a criterion. One file each; `base.py` holds the contract."""

from recon.pruning.refinement.base import Refined, Refinement, refined
from recon.pruning.refinement.swaps import Swaps

__all__ = ["Refined", "Refinement", "Swaps", "refined"]
