"""Criteria: measures of the importance of weights. One file each; `base.py` has the interface."""

from recon.pruning.criteria.admm import ADMM
from recon.pruning.criteria.alps import ALPS
from recon.pruning.criteria.base import Criterion
from recon.pruning.criteria.frequency import Frequency
from recon.pruning.criteria.magnitude import Magnitude
from recon.pruning.criteria.random import Random
from recon.pruning.criteria.reap import REAP
from recon.pruning.criteria.ria import RIA
from recon.pruning.criteria.sparsefw import SparseFW
from recon.pruning.criteria.sparsegpt import SparseGPT
from recon.pruning.criteria.wanda import Wanda

__all__ = [
    "ADMM",
    "ALPS",
    "REAP",
    "RIA",
    "Criterion",
    "Frequency",
    "Magnitude",
    "Random",
    "SparseFW",
    "SparseGPT",
    "Wanda",
]
