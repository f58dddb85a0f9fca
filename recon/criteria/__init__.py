"""Criteria: how much a weight matters. One file each; `base.py` holds the contract."""

from recon.criteria.base import Criterion
from recon.criteria.magnitude import Magnitude
from recon.criteria.random import Random
from recon.criteria.wanda import Wanda

__all__ = ["Criterion", "Magnitude", "Random", "Wanda"]
