"""Options of windows that learn: losses, which parameters, groups of matrices, and the solvers of the matrix scope."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor
from torch.nn import functional as F

from callbacks import MaskEnforcer
from recon.models.anatomy import Anatomy
from recon.models.matrices import Matrix
from recon.models.replay import Replay
from recon.models.windows import Windows
from recon.scopes import BlockDistillation, MatrixReconstruction, SubmoduleDistillation
from recon.scopes.local.module import LocalScope
from recon.solvers import ADMMSolver, ConjugateGradients, GradientDescent
from tests.support.families import tiny
from tests.support.scope_fixtures import (
    IGNORED,
    data_of,
    prepared,
    random_masks,
    same,
    save_tiny,
    trainer_of,
    untimed,
    weights_of,
)
from tests.support.slow import slow

COMPILER = [  # what it sets off within torch
    "ignore:`torch.jit.script_method` is deprecated",
    "ignore:The .grad attribute of a Tensor that is not a leaf",
]
pytestmark = [pytest.mark.filterwarnings(one) for one in ("error", *IGNORED, *COMPILER)]

GROUPS = [["*.q_proj", "*.k_proj", "*.v_proj"], ["*.o_proj"], ["*.gate_proj", "*.up_proj"], ["*.down_proj"]]
SHORT = {"epochs": 2, "lr": 3e-3, "batch_size": 4}


def block(tmp_path: Path, family: str = "llama", **options: Any) -> BlockDistillation:
    return BlockDistillation(name=save_tiny(family, tmp_path), **{**SHORT, **options})


def grouped(tmp_path: Path, groups: list[list[str]] = GROUPS, **options: Any) -> SubmoduleDistillation:
    return SubmoduleDistillation(name=save_tiny("llama", tmp_path), windows=Windows(groups), **{**SHORT, **options})


def fit(scope: LocalScope, **trainer: Any) -> dict[str, Tensor]:
    trainer_of(MaskEnforcer(), **trainer).fit(scope)
    return weights_of(scope.model)


# --- losses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["normalised", "mse", "cosine"])
def test_the_loss_is_what_its_name_says(loss: str, tmp_path: Path) -> None:
    scope = prepared(block(tmp_path, loss=loss, epochs=1, lr=1e-9))
    losses: list[tuple[Tensor, dict[str, Tensor]]] = []
    step = scope.training_step

    def noting(batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        result = step(batch, batch_idx)
        losses.append((result.detach(), batch))
        return result

    scope.training_step = noting
    fit(scope)
    value, batch = losses[-1]
    with torch.no_grad():
        output, target = scope.replay.run(2, batch["hidden"]).double(), batch["target"].double()
    expected = {
        "normalised": (output - target).square().sum() / target.square().sum(),
        "mse": (output - target).square().mean(),
        "cosine": 1 - ((output * target).sum(-1) / (output.norm(dim=-1) * target.norm(dim=-1))).mean(),
    }[loss]
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-7)
    assert scope.label == ("block" if loss == "normalised" else f"block ({loss})")


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_every_loss_brings_the_output_closer(loss: str, tmp_path: Path) -> None:
    scope = block(tmp_path, loss=loss, epochs=8)
    data = data_of()
    data._tokens["validation"] = data.tokens("train")
    fit(prepared(scope, data))
    assert all(result["after"] < result["before"] for result in scope.results.values())


# --- compiled -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", [SubmoduleDistillation, BlockDistillation])
def test_compiled_windows_learn_the_same_with_one_compilation_for_all_blocks(kind: Any, tmp_path: Path) -> None:
    results, graphs = [], {}
    for compile in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        scope = kind(name=save_tiny("llama", tmp_path), compile=compile, **SHORT)
        fit(prepared(scope))
        results.append([result["after"] for result in scope.results.values()])
        graphs[compile] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        blocks = Anatomy.of(scope.model).blocks
        assert not any("forward" in vars(child) for block in blocks for child in block.module.children())
    assert results[1] == pytest.approx(results[0], rel=1e-3)
    # Attention, MLP and norm, with and without gradients, and for batches of any size; there are three blocks.
    assert graphs[False] == 0 < graphs[True] <= 16


def test_groups_are_not_compiled(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.windows watches single matrices.*got model.compile: true"):
        grouped(tmp_path, compile=True)


# --- which parameters learn ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("parameters", ["all", "weights", "vectors", "lora"])
def test_only_the_chosen_parameters_move(parameters: str, family: str, tmp_path: Path) -> None:
    scope = prepared(block(tmp_path, family, parameters=parameters, start="pruned"))
    start = weights_of(scope.model)
    for name, keep in scope.masks.items():
        start[name] = start[name].masked_fill(~keep, 0)
    end = fit(scope)
    assert start.keys() == end.keys()  # adapters are gone
    moved = {name for name in end if not torch.equal(start[name], end[name])}
    inside = {name for one in Anatomy.of(scope.model).blocks for name in one.parameters()}
    expected = {
        "all": inside,
        "weights": set(scope.masks),
        "vectors": {name for name in inside if end[name].ndim == 1},
        "lora": set(scope.masks),
    }[parameters]
    # A key's bias shifts all scores of a query alike: softmax does not see it, rounding may.
    assert {name for name in moved ^ expected if not name.endswith("bias")} == set()
    scope.masks.check(scope.model)
    assert all("forward" not in vars(module) for module in scope.model.modules())
    assert scope.label == ("block" if parameters == "all" else f"block ({parameters})")


def test_what_learned_does_not_learn_on_and_leaves_no_state(tmp_path: Path) -> None:
    scope = prepared(block(tmp_path, parameters="lora"))
    seen: list[tuple[int, set[str]]] = []
    step = scope.training_step

    def noting(batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        learning = {name for name, one in scope.model.named_parameters() if one.requires_grad}
        seen.append((len(scope._optimizer().state), learning))
        return step(batch, batch_idx)

    scope.training_step = noting
    fit(scope)
    assert len(seen) == 3 * 2 * 3  # blocks, epochs, batches
    for index, (num_states, learning) in enumerate(seen):
        depth, first = index // 6, index % 6 == 0
        assert all(f".layers.{depth}." in name and name[-6:] in ("lora_A", "lora_B") for name in learning)
        assert num_states == (0 if first else len(learning))


def test_a_window_without_vectors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.parameters: vectors needs .* window 000.0-q_proj-k_proj-v_proj"):
        fit(prepared(grouped(tmp_path, parameters="vectors")))


def test_adapters_of_a_killed_run_are_merged_or_gone(tmp_path: Path) -> None:
    expected = fit(prepared(block(tmp_path, parameters="lora")))
    broken = prepared(block(tmp_path, parameters="lora"), directory=tmp_path / "run")
    step = broken.training_step

    def killed(batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if len(broken.results) == 1 and batch_idx == 1:
            raise RuntimeError("killed")
        return step(batch, batch_idx)

    broken.training_step = killed
    with pytest.raises(RuntimeError, match="killed"):
        fit(broken)
    assert same(fit(prepared(block(tmp_path, parameters="lora"), directory=tmp_path / "run")), expected)


# --- groups of matrices -------------------------------------------------------------------------------


def test_groups_take_dense_inputs_and_return_what_the_dense_ones_do(tmp_path: Path) -> None:
    """Whatever was recovered before: each group's inputs and targets are those of the dense model."""
    scope = prepared(grouped(tmp_path))
    seen: dict[str, dict[str, Tensor]] = {}
    begin = scope.begin

    def noting(window: Any) -> None:
        begin(window)
        seen[window.name] = scope.calibration.batch(window, slice(None))

    scope.begin = noting
    fit(scope)
    dense = tiny("llama")
    replay, tokens = Replay(dense, Anatomy.of(dense)), data_of().tokens("train")
    names = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    outputs: dict[str, Tensor] = {}
    for name, module in dense.named_modules():
        module.register_forward_hook(lambda module, args, out, name=name: outputs.update({name: out}))
    with torch.no_grad():
        hidden = replay.embed(tokens)
        for index in range(3):
            following = replay.run(index, hidden)
            for number, group in enumerate(names):
                batch = seen[f"{index:03d}.{number}-{'-'.join(group)}"]
                torch.testing.assert_close(batch["hidden"], hidden)
                expected = [
                    out for name, out in outputs.items() for one in group if name.endswith(f"{index}.{_of(one)}")
                ]
                torch.testing.assert_close(batch["target"], torch.cat(expected, dim=-1))
            hidden = following
    scope.masks.check(scope.model)
    assert scope.label == "submodule (4 groups)"


def _of(name: str) -> str:
    return f"self_attn.{name}" if name[0] in "qkvo" else f"mlp.{name}"


def test_a_group_that_holds_no_nonlinearity_ends_at_least_squares(tmp_path: Path) -> None:
    """From the exact start there is nothing left to learn for single matrices."""
    scope = prepared(grouped(tmp_path, lr=1e-4, epochs=1, start="exact"))
    fit(scope)
    solver = ConjugateGradients(improvement=1e-2)
    exact = MatrixReconstruction(name=save_tiny("llama", tmp_path), batch_size=4, solver=solver)
    fit(prepared(exact))
    name = "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(scope.model.get_parameter(name), exact.model.get_parameter(name), rtol=0.1, atol=2e-3)
    assert [result["holds_nonlinearity"] for result in scope.results.values()] == [False] * 12


def test_a_group_may_hold_a_nonlinearity(tmp_path: Path) -> None:
    scope = prepared(grouped(tmp_path, [["*.self_attn.*"], ["*.mlp.*"]], parameters="weights"))
    fit(scope)
    assert {result["holds_nonlinearity"] for result in scope.results.values()} == {True}


@pytest.mark.parametrize("stop", [slow(1), 4, slow(6)])
def test_groups_go_on_after_a_kill(stop: int, tmp_path: Path) -> None:
    straight = prepared(grouped(tmp_path))
    expected = fit(straight)
    broken = prepared(grouped(tmp_path), directory=tmp_path / "run")
    finish = broken._finish

    def killed() -> None:
        finish()
        if len(broken.results) == stop:
            raise RuntimeError("killed")

    broken._finish = killed
    with pytest.raises(RuntimeError, match="killed"):
        fit(broken)
    again = prepared(grouped(tmp_path), directory=tmp_path / "run")
    assert same(fit(again), expected)
    assert untimed(again.results) == untimed(straight.results)
    finished = prepared(grouped(tmp_path), directory=tmp_path / "run")
    assert same(fit(finished), expected)


def test_groups_that_leave_a_pruned_matrix_out_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pruned weight must belong to one window, .*down_proj"):
        prepared(grouped(tmp_path, GROUPS[:-1]))
    scope = grouped(tmp_path, GROUPS[:-1])
    scope.load(data_of())
    scope.prepare(data_of(), random_masks(scope.model, exclude=("*.down_proj",)))


def test_groups_are_recovered_on_dense_inputs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"groups of matrices are recovered on dense inputs, got model.propagation"):
        prepared(grouped(tmp_path, propagation="recovered"))


# --- solvers of the matrix scope ----------------------------------------------------------------------


def matrix(tmp_path: Path, family: str = "llama", **options: Any) -> MatrixReconstruction:
    return prepared(MatrixReconstruction(name=save_tiny(family, tmp_path), batch_size=4, **options))


@pytest.mark.parametrize("family", ["llama", slow("gpt2")])
@pytest.mark.parametrize("propagation", ["dense", "recovered"])
def test_solvers_come_close_to_the_exact_one(propagation: str, family: str, tmp_path: Path) -> None:
    errors = {}
    for solver in (None, ADMMSolver(), GradientDescent(steps=100, lr=1e-2)):
        scope = matrix(tmp_path, family, solver=solver, propagation=propagation)
        start = [one.clone() for one in scope.model.parameters()]
        fit(scope)
        assert any(not torch.equal(a, b) for a, b in zip(start, scope.model.parameters(), strict=True))
        first = scope.results["000"]["matrices"]
        errors[str(scope.solver)] = {name: one["relative_error"] for name, one in first.items()}
        assert all(one["seconds"] >= 0 and one["iterations"] > 0 for one in first.values())
        scope.masks.check(scope.model)
    for name, best in errors["cg"].items():
        assert best <= errors["admm"][name] * (1 + 1e-4)
        assert best <= errors["gradient descent"][name] * (1 + 1e-4)
        assert errors["gradient descent"][name] < 3 * best + 1e-3


def test_gradient_descent_is_trained_by_lightning(tmp_path: Path) -> None:
    """As many optimizer steps as asked for, a schedule that begins anew, and the loss it says."""
    scope = matrix(tmp_path, solver=GradientDescent(steps=5, lr=1e-3, warmup=0.2))
    rates, losses = [], []
    step = scope.training_step

    def noting(batch: Any, batch_idx: int) -> Tensor | None:
        rates.append(scope._optimizer().param_groups[0]["lr"])
        losses.append(step(batch, batch_idx))
        return losses[-1]

    scope.training_step = noting
    fit(scope)
    assert len(rates) == 3 * 5
    assert rates[:5] == rates[5:10] == rates[10:]
    assert scope.label == "matrix (gradient descent)"
    dense, name = tiny("llama"), "model.layers.0.mlp.down_proj"
    inputs: list[Tensor] = []
    dense.get_submodule(name).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        dense(data_of().tokens("train"))
    weight, recovered = (Matrix.of_module(name, model.get_submodule(name)).weight for model in (dense, scope.model))
    target, output = (F.linear(inputs[0], one).double() for one in (weight, recovered))
    expected = (output - target).square().sum() / target.square().sum()
    reported = scope.results["000"]["matrices"][f"{name}.weight"]["relative_error"]
    assert reported == pytest.approx(float(expected), rel=1e-3)
