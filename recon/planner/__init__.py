"""What a run would need, predicted from the model's configuration alone, before anything is downloaded."""

from recon.planner.fitting import Proposal, propose
from recon.planner.forecast import forecast
from recon.planner.memory import CATEGORIES, Moment, Prediction, Shape, predict
from recon.planner.setting import SCOPES, Setting
from recon.planner.table import print_plan
from recon.planner.work import Kind

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
