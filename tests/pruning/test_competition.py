"""The choice across the model has the masks of one sort of all scores, and keeps no scores."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from recon.pruning.competition import Competition
from recon.pruning.criteria import Wanda
from recon.pruning.patterns import Unstructured
from recon.pruning.prune import prune
from tests.support.families import tiny, token_ids

SHAPES = {"b": (40, 6), "a": (3, 50), "c": (1, 2)}


def drawn(kind: str, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    if kind == "ties":
        return {name: (2 * one).round() for name, one in scores.items()}
    if kind == "in one range":  # alike in their upper bits, with ties in the lower ones
        return {name: 1 + (8 * one).round() * 2**-23 for name, one in scores.items()}
    return {name: one.bfloat16() if kind == "bf16" else one for name, one in scores.items()}


def sorted_at_once(scores: dict[str, Tensor], num_kept: int) -> Tensor:
    flat = torch.cat([one.flatten().float() for one in scores.values()])
    keep = torch.zeros(len(flat), dtype=torch.bool)
    keep[flat.argsort(descending=True, stable=True)[:num_kept]] = True
    return keep


@pytest.mark.parametrize("kind", ["distinct", "ties", "in one range", "bf16"])
@pytest.mark.parametrize("num_kept", [0, 1, 100, 196, 391, 392])
def test_the_masks_are_those_of_one_sort(kind: str, num_kept: int) -> None:
    for seed in range(3):
        scores = drawn(kind, seed)
        competition = Competition(lambda num: num_kept)
        for take in (competition.count, competition.mark):
            for name, one in scores.items():
                take(name, one)
        masks = dict(competition.masks())
        assert list(masks) == list(SHAPES)
        assert torch.equal(torch.cat([one.flatten() for one in masks.values()]), sorted_at_once(scores, num_kept))


def test_other_scores_in_the_second_pass_are_refused() -> None:
    competition = Competition(lambda num: num // 2)
    competition.count("a", torch.arange(8.0).view(2, 4))
    competition.mark("a", torch.full((2, 4), 100.0))
    with pytest.raises(RuntimeError, match=r"needs the same ones.*deterministic"):
        list(competition.masks())


@pytest.mark.slow
def test_pruning_across_the_model_keeps_the_scores_of_one_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []
    largest, scores = 0, Wanda.scores

    def watched(self: Wanda, *args: Any) -> Tensor:
        nonlocal largest
        gc.collect()
        largest = max(largest, sum(one() is not None for one in alive))
        found = scores(self, *args)
        alive.append(weakref.ref(found))
        return found

    monkeypatch.setattr(Wanda, "scores", watched)
    masks = prune(tiny("llama"), token_ids(), Wanda(), Unstructured(0.5, per="model"))
    assert len(alive) == 2 * len(masks)
    assert largest <= 1
