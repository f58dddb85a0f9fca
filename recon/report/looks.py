"""Colours and markers of pictures and pages: Okabe and Ito's, which people with any colour vision tell apart."""

from dataclasses import dataclass

from recon.profiling.entries import Category

GREY, DARK = "#9a9a9a", "#333333"


@dataclass(frozen=True)
class Look:
    """How a scope is drawn; `symbol` is plotly's name of `marker`."""

    color: str
    marker: str
    symbol: str
    size: float


# larger scopes have larger markers and are drawn first: coinciding points all stay visible
LOOKS = {
    "full": Look("#CC79A7", "^", "triangle-up", 11.0),
    "block": Look("#009E73", "D", "diamond", 7.5),
    "submodule": Look("#0072B2", "s", "square", 7.0),
    "matrix": Look("#D55E00", "o", "circle", 6.0),
}

REFERENCE = Look(DARK, "", "x", 6.0)
"""Of the pruned and the dense model."""

# what training holds is warm, what calibration holds cold, the rest grey
CATEGORY_COLORS: dict[Category, str] = {
    "weights": "#0072B2",
    "gradients": "#F0E442",
    "optimizer": "#E69F00",
    "activations": "#D55E00",
    "calibration": "#009E73",
    "gram": "#56B4E9",
    "masks": "#CC79A7",
    "other": "#b5b5b5",
}

CATEGORY_NAMES: dict[Category, str] = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "kept for backward",
    "calibration": "calibration activations",
    "gram": "Gram matrices",
    "masks": "masks",
    "other": "other",
}
