"""The shape that tests of the planner share."""

import pytest

from recon.models.loading import ModelSource
from recon.planner import Shape
from tests.support.shapes import PLANNED


@pytest.fixture(scope="module")
def llama() -> Shape:
    return Shape(ModelSource("random", PLANNED))
