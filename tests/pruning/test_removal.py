"""Removal of whole experts: the choice, the computation among survivors, the smaller model that is written."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from recon.models.anatomy import Anatomy
from recon.models.fewer_experts import smaller, stacks
from recon.pruning.criteria.base import Criterion
from recon.pruning.criteria.frequency import Frequency
from recon.pruning.masks import Masks
from recon.pruning.patterns import Experts
from recon.pruning.prune import prune
from recon.pruning.removal import kept_in
from recon.pruning.start_weights import apply
from tests.support.families import MIXTURES, tiny, token_ids
from tests.support.slow import quick

KEEP = 0.75


def removed(family: str, criterion: Criterion) -> tuple[PreTrainedModel, Masks]:
    model = tiny(family)
    return model, prune(model, token_ids(8, 16), criterion, Experts(KEEP))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


@pytest.mark.parametrize("family", quick(list(MIXTURES), "gpt_oss", "deepseek_v3"))
def test_the_written_model_computes_what_the_pruned_one_does(family: str, tmp_path: Path) -> None:
    model, masks = removed(family, Frequency())
    dense, kept = logits(model), kept_in(masks, Anatomy.of(model))
    assert kept
    assert all(len(survivors) == 3 for survivors in kept.values())
    apply(model, masks, None)
    pruned = logits(model)
    assert not torch.allclose(pruned, dense)
    written, state = smaller(model, 3).model(model, None, kept)
    written.save_pretrained(tmp_path, state_dict=state)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), pruned)
    assert set(stacks(Anatomy.of(loaded).blocks[-1]).values()) == {3}
    assert loaded.num_parameters() < model.num_parameters()
