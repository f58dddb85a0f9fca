"""Owners of the tensors of a run, for the account of memory.

Objects are read whenever a scan finds them, even during their `__init__`: hence `vars`.
"""

import torch

from recon.calibration.activations import Activations
from recon.calibration.statistics import InputStatistics
from recon.data import TokenData
from recon.models.offload.blocks import OffloadedBlocks
from recon.profiling.entries import Held, Holders
from recon.pruning.masks import Masks
from recon.scopes.local.window_state import StartCopies
from recon.solvers import LeastSquares

GRAMS = ("sum_squares", "gram", "cross", "dense_gram")

HOLDERS: Holders = {
    torch.optim.Optimizer: lambda one: [Held("optimizer", vars(one).get("state"))],
    Activations: lambda one: one.held(),
    InputStatistics: lambda one: [Held("gram", [vars(one).get(name) for name in GRAMS])],
    LeastSquares: lambda one: [Held("gram", [vars(one).get(name) for name in GRAMS])],
    Masks: lambda one: [Held("masks", vars(one).get("_packed"), on_host=True)],
    StartCopies: lambda one: [Held("weights", vars(one).get("weights"), on_host=True)],
    OffloadedBlocks: lambda one: [Held("weights", one.host_copies(), on_host=True)],
    TokenData: lambda one: [Held("other", vars(one).get("_tokens"), on_host=True)],
}
