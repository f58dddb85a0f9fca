"""What a run would need, predicted from the model's configuration alone, before anything is downloaded."""

from recon.planner.flops import Kind
from recon.planner.options import SCOPES, Setting
from recon.planner.prediction import CATEGORIES, Moment, Prediction, Shape, forecast, predict
from recon.planner.proposals import Proposal, propose
from recon.planner.table import print_plan

__all__ = [
    "CATEGORIES",
    "SCOPES",
    "Kind",
    "Moment",
    "Prediction",
    "Proposal",
    "Setting",
    "Shape",
    "forecast",
    "predict",
    "print_plan",
    "propose",
]
