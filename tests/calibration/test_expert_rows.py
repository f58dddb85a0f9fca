"""Statistics of experts: from the rows that the router sends to each, or from all rows of the block."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recon.calibration.activations import Activations
from recon.calibration.collection import collect
from recon.calibration.pairs import collect_pairs
from recon.models.anatomy import Anatomy
from recon.models.experts import expert_by_expert
from recon.models.matrices import Matrix
from recon.models.replay import Replay
from recon.pruning.criteria import Wanda
from recon.pruning.patterns import NM
from recon.scopes.exact import solve
from tests.support import references
from tests.support.families import tiny, token_ids

CPU = torch.device("cpu")
TOKENS = token_ids(batch=6, seq=16, seed=4)


def walk(family: str, need: Any, experts: Any = "routed") -> tuple[Replay, dict[str, Any], list[dict[str, Any]]]:
    """Statistics of block 1, and the arguments of its experts, as seen by hooks of the test's own."""
    model = tiny(family)
    replay = Replay(model, Anatomy.of(model))
    replay.experts.rows = experts
    block = replay.anatomy.blocks[1]
    (owner,) = block.experts
    calls: list[dict[str, Any]] = []
    handle = owner.register_forward_pre_hook(lambda module, args: calls.append({"args": args}))
    found = Activations(replay, TOKENS, 2, CPU).enter([1], block.weights_among(replay.anatomy.prunable()), need)
    handle.remove()
    return replay, found, calls


def routed(calls: list[dict[str, Any]], expert: int) -> Tensor:
    """The rows whose choice names the expert, in the order of the model: first choices first."""
    every = [one["args"] for one in calls]
    return torch.cat([hidden[place == expert] for hidden, choice, *_ in every for place in choice.T])


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_see_the_rows_that_are_routed_to_them(family: str) -> None:
    replay, found, calls = walk(family, "gram")
    (owner,) = replay.anatomy.blocks[1].experts
    total = 0
    for expert in range(4):
        x = routed(calls, expert)
        name = f"model.layers.1.mlp.experts.gate_up_proj.{expert}"
        assert found[name].num_tokens == len(x)
        torch.testing.assert_close(found[name].gram, references.gram(x).float())
        matrix = replay.anatomy.blocks[1].matrices[name]
        up = x @ matrix.weight.T + (owner.gate_up_proj_bias[expert].detach() if family == "gpt_oss" else 0)
        inner = owner._apply_gate(up).detach()
        down = found[name.replace("gate_up", "down")]
        assert down.num_tokens == len(x)
        torch.testing.assert_close(down.gram, references.gram(inner).float(), rtol=1e-5, atol=1e-6)
        total += len(x)
    assert total == 2 * TOKENS.numel()
    assert replay.experts.few.keys() <= {n for n, one in found.items() if one.num_tokens < 64}


def test_one_batched_product_counts_each_row_where_it_is_meant() -> None:
    _, found, calls = walk("llama4_text", "gram")
    for expert in range(4):
        x = torch.cat([one["args"][0].view(4, -1, 32)[expert] for one in calls])
        one = found[f"model.layers.1.feed_forward.experts.gate_up_proj.{expert}"]
        assert one.num_tokens == int(x.any(-1).sum())
        torch.testing.assert_close(one.gram, references.gram(x).float())
    counted = [one.num_tokens for name, one in found.items() if "gate_up_proj" in name]
    assert sum(counted) == TOKENS.numel()  # one expert a token


def test_all_rows_reach_every_expert_and_the_model_computes_as_before() -> None:
    _, some, calls = walk("mixtral", "norms")
    replay, found, _ = walk("mixtral", "norms", "all")
    rows = torch.cat([one["args"][0] for one in calls])
    for expert in range(4):
        one = found[f"model.layers.1.mlp.experts.gate_up_proj.{expert}"]
        assert one.num_tokens == TOKENS.numel()
        torch.testing.assert_close(one.norms, rows.norm(dim=0))
        assert found[f"model.layers.1.mlp.experts.down_proj.{expert}"].num_tokens == TOKENS.numel()
    assert replay.experts.few == {}
    attention = [name for name in found if "self_attn" in name]
    assert all(torch.equal(found[name].norms, some[name].norms) for name in attention)


def test_hidden_states_do_not_depend_on_what_is_collected() -> None:
    outputs = []
    for need, experts in (("none", "routed"), ("gram", "routed"), ("gram", "all")):
        model = tiny("mixtral")
        replay = Replay(model, Anatomy.of(model))
        replay.experts.rows = experts
        activations = Activations(replay, TOKENS, 2, CPU)
        activations.enter([0, 1], replay.anatomy.prunable(["model.layers.2.*"]), need)
        assert activations.output is not None
        outputs.append(activations.output)
        assert model.config._experts_implementation != "eager"
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def lonely(family: str = "mixtral") -> Replay:
    """A model whose router never chooses experts 2 and 3 of block 0."""
    model = tiny(family)
    gate = model.model.layers[0].mlp.gate.weight
    with torch.no_grad():  # of logits y, -y, 0 and 0 the highest is one of the first two
        gate[1] = -gate[0]
        gate[2:] = 0.0
    model.model.layers[0].mlp.gate.top_k = 1
    return Replay(model, Anatomy.of(model))


def test_an_expert_without_rows_is_refused_by_criteria_and_kept_by_starts() -> None:
    replay = lonely()
    seen: list[Tensor] = []
    (owner,) = replay.anatomy.blocks[0].experts
    owner.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    matrices = replay.anatomy.blocks[0].weights_among(replay.anatomy.prunable())
    statistics = Activations(replay, TOKENS, 2, CPU).enter([0], matrices, "gram")
    chosen = torch.cat(seen).unique().tolist()
    absent = [expert for expert in range(4) if expert not in chosen]
    assert absent, "the test needs an expert that is never chosen"
    name = f"model.layers.0.mlp.experts.down_proj.{absent[0]}"
    assert statistics[name].num_tokens == replay.experts.few[name] == 0
    with pytest.raises(ValueError, match=rf"wanda needs the norms .*`{name}`, got no row.*pruning\.experts: all"):
        Wanda().prune(matrices[name].weight, statistics[name], NM(), name)
    keep = NM().select(matrices[name].weight.abs())
    solution = solve(matrices[name], statistics[name], keep)
    assert torch.equal(solution.weight, matrices[name].weight * keep)


def test_all_rows_need_a_module_that_is_told_the_choice() -> None:
    with pytest.raises(ValueError, match=r"got Llama4TextExperts.*choose pruning\.experts: routed"):
        walk("llama4_text", "norms", "all")


def test_pairs_of_streams_need_all_rows() -> None:
    model = tiny("mixtral")
    matrices = Anatomy.of(model).prunable()
    with pytest.raises(ValueError, match=r"choose pruning\.experts: all"), collect_pairs(matrices):
        pass
    with collect_pairs(matrices, "all") as pairs:
        for stream in (pairs.dense, pairs.recovered):
            with (
                stream(),
                torch.no_grad(),
                expert_by_expert([one for b in Anatomy.of(model).blocks for one in b.experts]),
            ):
                model(TOKENS, use_cache=False)
    one = pairs.statistics["model.layers.0.mlp.experts.down_proj.1"]
    assert one.num_tokens == TOKENS.numel()
    torch.testing.assert_close(one.cross, one.gram)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_an_expert_is_solved_as_the_same_linear_map_is(family: str) -> None:
    replay, found, calls = walk(family, "gram")
    name = "model.layers.1.mlp.experts.gate_up_proj.1"
    matrix = replay.anatomy.blocks[1].matrices[name]
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    linear.weight.data.copy_(matrix.weight)
    same = Matrix.of_module("m", linear)
    with torch.no_grad(), collect({"m": same}, "gram") as statistics:
        for one in calls:
            linear(routed([one], 1))
    assert torch.equal(statistics["m"].gram, found[name].gram)
    keep = NM().select(matrix.weight.abs())
    one, other = solve(matrix, found[name], keep), solve(same, statistics["m"], keep)
    assert torch.equal(one.weight, other.weight)
    assert one.relative_error == pytest.approx(other.relative_error, rel=1e-6)  # its sum follows the weight's layout
    assert one.relative_error > 0
