"""Criteria: how much a weight matters. One file each; `base.py` holds the contract."""

from recon.criteria.admm import ADMM
from recon.criteria.alps import ALPS
from recon.criteria.base import Criterion
from recon.criteria.magnitude import Magnitude
from recon.criteria.random import Random
from recon.criteria.ria import RIA
from recon.criteria.sparsefw import SparseFW
from recon.criteria.sparsegpt import SparseGPT
from recon.criteria.wanda import Wanda

__all__ = ["ADMM", "ALPS", "RIA", "Criterion", "Magnitude", "Random", "SparseFW", "SparseGPT", "Wanda"]
