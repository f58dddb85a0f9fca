"""Prediction of memory, disk, FLOPs and time of a run from the model's configuration, before anything is downloaded."""

from recon.planner.flops import Kind
from recon.planner.options import SCOPES, PlanOptions
from recon.planner.prediction import Prediction, Shape, forecast, predict
from recon.planner.proposals import Proposal, propose
from recon.planner.snapshot import Snapshot
from recon.planner.table import print_plan

__all__ = [
    "SCOPES",
    "Kind",
    "PlanOptions",
    "Prediction",
    "Proposal",
    "Shape",
    "Snapshot",
    "forecast",
    "predict",
    "print_plan",
    "propose",
]
