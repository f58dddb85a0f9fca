"""Models of several families, and a model whose MLP fails."""

from collections.abc import Iterator

import pytest
from transformers import PreTrainedModel

from recon.models.replay import Replay
from tests.support.families import FAMILIES, tiny
from tests.support.replays import replay_of


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny(request.param)


@pytest.fixture
def llama() -> Replay:
    return replay_of(tiny("llama"))


@pytest.fixture
def broken_mlp(llama: Replay) -> Iterator[Replay]:
    handle = llama.model.model.layers[0].mlp.register_forward_hook(lambda *_: 1 / 0)
    yield llama
    handle.remove()
