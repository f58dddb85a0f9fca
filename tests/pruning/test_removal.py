"""Removal of whole experts: the choice, the computation among survivors, the smaller model that is written."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from recon.models.anatomy import Anatomy
from recon.models.fewer_experts import smaller, stacks
from recon.pruning.allocation.owl import OWL
from recon.pruning.criteria import REAP, Frequency, Wanda
from recon.pruning.criteria.base import Criterion
from recon.pruning.criteria.experts import Routing
from recon.pruning.masks import Masks
from recon.pruning.patterns import NM, Experts, Pattern
from recon.pruning.prune import Pruning, prune
from recon.pruning.recorded_pattern import broken, recorded
from recon.pruning.removal import kept_in
from recon.pruning.start_weights import apply
from recon.pruning.whole_slices import kept_slices, removes_slices, without_removed
from tests.support.families import MIXTURES, tiny, token_ids
from tests.support.slow import quick

KEEP = 0.75

REFUSED = {
    "llama4_text": "the chosen experts alone, got one that computes all 4 for every token",
    "jetmoe": "needs blocks with one mixture, got model.layers.0, whose stacks",
}
"""All experts of the first multiply with all tokens, so that the router's choice cannot be seen. The second has experts
in attention, too."""


class Noting(REAP):
    """REAP that keeps what it was given."""

    seen: list[Routing] = []  # noqa: RUF012 -- cleared by the test

    def rate(self, routing: Routing) -> Tensor:
        self.seen.append(routing)
        return super().rate(routing)


def removed(family: str, criterion: Criterion) -> tuple[PreTrainedModel, Masks]:
    model = tiny(family)
    return model, prune(model, token_ids(8, 16), criterion, Experts(KEEP))


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


@pytest.mark.parametrize("family", quick([one for one in MIXTURES if one not in REFUSED], "gpt_oss"))
def test_the_written_model_computes_what_the_pruned_one_does(family: str, tmp_path: Path) -> None:
    model, masks = removed(family, Frequency())
    dense, kept = logits(model), kept_in(masks, model)
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


def slow_routing(model: PreTrainedModel, tokens: Tensor) -> list[Routing]:
    """Count tokens and sum gate value times norm of the output, token by token and expert by expert."""
    top, found = model.config.num_experts_per_tok, []

    def watch(module: torch.nn.Module, args: tuple[Tensor]) -> None:
        counts = torch.zeros(len(module.experts.gate_up_proj))
        sums = torch.zeros_like(counts)
        for x in args[0].flatten(0, 1):
            gates = (module.gate.weight @ x).softmax(-1)
            chosen = gates.argsort(descending=True)[:top].tolist()
            total = sum(gates[one] for one in chosen) if model.config.norm_topk_prob else 1.0
            for one in chosen:
                gate, up = (module.experts.gate_up_proj[one] @ x).chunk(2)
                output = module.experts.down_proj[one] @ (F.silu(gate) * up)
                counts[one] += 1
                sums[one] += gates[one] / total * output.norm()
        found.append(Routing(counts, sums))

    handles = [block.mlp.register_forward_pre_hook(watch) for block in model.model.layers]
    with torch.no_grad():
        model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("normalised", [True, False])
def test_scores_are_those_of_a_loop_over_tokens(normalised: bool) -> None:
    model = tiny("qwen3_moe", norm_topk_prob=normalised, num_hidden_layers=2)
    tokens, expected = (
        token_ids(4, 8),
        slow_routing(tiny("qwen3_moe", norm_topk_prob=normalised, num_hidden_layers=2), token_ids(4, 8)),
    )
    Noting.seen.clear()
    masks = prune(model, tokens, Noting(), Experts(0.5), Pruning(batch_size=3))
    by_count = prune(model, tokens, Frequency(), Experts(0.5), Pruning(batch_size=3))
    for index, (got, loop) in enumerate(zip(Noting.seen, expected, strict=True)):
        assert torch.equal(got.tokens, loop.tokens)
        torch.testing.assert_close(got.weighted_norms, loop.weighted_norms, rtol=1e-4, atol=1e-5)
        means = loop.weighted_norms / loop.tokens.clamp(min=1)
        for name in (f"model.layers.{index}.mlp.experts.{one}" for one in ("gate_up_proj", "down_proj")):
            assert kept_slices(masks, name) == sorted(means.argsort(descending=True)[:2].tolist())
            counted = kept_slices(by_count, name)
            assert counted is not None
            assert loop.tokens[counted].sum() == loop.tokens.sort(descending=True).values[:2].sum()


def test_masks_keep_slices_whole_and_know_their_rule() -> None:
    model, masks = removed("qwen3_moe", REAP())
    anatomy, pattern = Anatomy.of(model), Experts(KEEP)
    assert {len(shape) for shape in masks.shapes.values()} == {3}
    assert masks.sparsity == 0.25
    assert removes_slices(masks)
    written = without_removed(masks)
    assert written.num_pruned == 0
    assert all(shape[0] == 3 for shape in written.shapes.values())
    assert without_removed(written) is written
    rule = recorded(pattern, anatomy.prunable().values())
    packed = {name: masks.packed(name) for name in masks}
    assert broken(rule, packed, masks.shapes) is None
    name = next(iter(masks))
    for change, said in ((slice(None), "4 of 4 experts"), ((0, 0), "neither all nor none")):
        keep = masks[name].clone()
        keep[change] = ~keep[change] if isinstance(change, tuple) else True
        other = Masks({name: keep})
        assert said in str(broken(rule, {name: other.packed(name)}, other.shapes))
    # A slice that is pruned in part: no expert is removed.
    assert kept_slices(other, name) is None
    assert not removes_slices(other)


@pytest.mark.parametrize("family", quick(REFUSED, "llama4_text"))
def test_families_without_a_visible_choice_are_refused(family: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[family]):
        removed(family, Frequency())


@pytest.mark.parametrize(
    ("family", "criterion", "pattern", "options", "said"),
    [
        ("llama", REAP(), Experts(), {}, "mixtures have one number of experts, .* got none"),
        ("qwen3_moe", REAP(), Experts(0.25), {}, "as many experts as a token is sent to, 2 of 4, got 1"),
        ("qwen3_moe", REAP(), Experts(0.9), {}, "fewer than the 4 of each mixture, got 4"),
        ("qwen3_moe", Wanda(), Experts(), {}, "a criterion that rates them, got criterion wanda"),
        ("qwen3_moe", REAP(), NM(), {}, "neither without the other"),
        ("qwen3_moe", REAP(), Experts(), {"inputs": "pruned"}, "needs pruning.inputs dense, got pruned"),
        ("qwen3_moe", REAP(), Experts(), {"experts": "all"}, "needs pruning.experts routed, got all"),
        ("qwen3_moe", REAP(), Experts(), {"exclude": ["*.down_proj"]}, "needs pruning.exclude"),
        ("qwen3_moe", REAP(), Experts(), {"allocation": OWL()}, "needs pruning.allocation None"),
        ("deepseek_v3", REAP(), Experts(0.75), {"n_group": 2}, "keep a multiple of their number"),
    ],
)
def test_refusals(family: str, criterion: Criterion, pattern: Pattern, options: dict, said: str) -> None:
    model = tiny(family, **{name: options.pop(name) for name in ("n_group",) if name in options})
    with pytest.raises(ValueError, match=said):
        prune(model, token_ids(), criterion, pattern, Pruning(**options))


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_a_fraction_is_needed(keep: float) -> None:
    with pytest.raises(ValueError, match="0 < keep < 1"):
        Experts(keep)
