"""What recovery starts from: the file, the exact solution, every scope's first forward pass, and a run end to end."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file, save_file
from torch import Tensor

from callbacks import MaskEnforcer
from recon.basics.run_paths import RunPaths
from recon.cli import main
from recon.models.anatomy import Anatomy
from recon.models.replay import Replay
from recon.profiling.phases import Phases
from recon.pruning.criteria import ALPS, SparseGPT
from recon.pruning.masks import Masks
from recon.pruning.patterns import Unstructured
from recon.pruning.prune import moved_with, prune_to
from recon.pruning.start_weights import Start, apply, written
from recon.scopes import BlockDistillation, FullRetraining, MatrixReconstruction, Scope, SubmoduleDistillation
from recon.scopes.exact import START_SOLVER, solve_all
from recon.scopes.local.module import LocalScope
from tests.support.families import tiny
from tests.support.processes import in_processes
from tests.support.scope_fixtures import (
    IGNORED,
    data_of,
    prepared,
    random_masks,
    same,
    save_tiny,
    trainer_of,
    weights_of,
)
from tests.support.shapes import TIED_LLAMA, random_model
from tests.support.slow import slow

pytestmark = [pytest.mark.filterwarnings(one) for one in IGNORED]

FAMILIES = ("llama", "gpt2", "phi")
SCOPES: dict[str, Callable[..., Scope]] = {
    "submodule": lambda **o: SubmoduleDistillation(**{"epochs": 1, "batch_size": 4, **o}),
    "two blocks": lambda **o: BlockDistillation(num_blocks=2, **{"epochs": 1, "batch_size": 4, **o}),
    "matrix": lambda **o: MatrixReconstruction(**{"batch_size": 4, **o}),
    "full": lambda **o: FullRetraining(**{"epochs": 1, **o}),
    "full distillation": lambda **o: FullRetraining(loss="distillation", **{"epochs": 1, **o}),
}


class FirstForward(Callback):
    """The weights of every window, or of the model, before their first step."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        owned = pl_module.window.owned if isinstance(pl_module, LocalScope) else pl_module.masks
        for name in owned:
            self.weights.setdefault(name, pl_module.model.get_parameter(name).detach().clone())


class Killed(Exception):
    pass


class Kill(Callback):
    """Ends a fit after some steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.steps -= 1
        if self.steps == 0:
            raise Killed


def fit(scope: Scope, *callbacks: Callback) -> dict[str, Tensor]:
    trainer_of(MaskEnforcer(), *callbacks).fit(scope)
    return weights_of(scope.model)


def exact_of(model: Any, masks: Masks) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    solve_all(Replay(model, Anatomy.of(model)), data_of().tokens("train"), masks, found.__setitem__, batch_size=4)
    return found


def moved_of(model: Any, directory: Path, criterion: Any = None) -> tuple[Masks, Start]:
    """Masks of a criterion that moves weights, and these, as a run keeps them."""
    file = directory / "masks.safetensors"
    tokens, moved_file = data_of().tokens("train"), RunPaths(directory).moved
    masks = prune_to(file, model, tokens, criterion or SparseGPT(), Unstructured(0.5), moved_file=moved_file)
    moved = moved_with(file, masks)
    assert moved is not None
    return masks, moved


# --- the file -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_start_is_read_as_it_was_written_in_any_order(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "new" / "start.safetensors"
    weights = {name: torch.randn(shape).to(dtype) for name, shape in (("a", (3, 5)), ("b", (1, 7)), ("c", (4, 2)))}
    with written(path, like=weights) as sink:
        for name in ("c", "a", "b"):
            sink(name, weights[name].T.contiguous().T)  # laid out as Conv1D's solution is
    assert same(load_file(path), weights)  # safetensors itself can read it
    start = Start(path, Masks({name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in weights.items()}))
    assert same(dict(start), weights)
    assert start["a"].dtype == dtype
    with pytest.raises(KeyError):
        start["d"]


def test_a_start_that_was_interrupted_leaves_no_file(tmp_path: Path) -> None:
    path, like = tmp_path / "start.safetensors", {"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}
    with pytest.raises(AssertionError, match="b"), written(path, like) as sink:
        sink("a", torch.ones(2, 2))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".start.safetensors.123.tmp").touch()  # of a process that was killed
    with written(path, like) as sink:
        sink("a", torch.ones(2, 2))
        sink("b", torch.ones(2, 2))
    assert list(tmp_path.iterdir()) == [path]


def test_a_weight_that_does_not_fit_its_dtype_is_refused(tmp_path: Path) -> None:
    like = {"a": torch.zeros(2, 2, dtype=torch.float16)}
    with (
        pytest.raises(ValueError, match=r"finite in torch\.float16, got NaN or infinity in `a`.*wider model\.dtype"),
        written(tmp_path / "x", like) as sink,
    ):
        sink("a", torch.full((2, 2), 1e6))
    assert list(tmp_path.iterdir()) == []


def test_a_start_of_other_masks_is_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    masks, moved = moved_of(model, tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=rf"`{name}`: \(64, 32\) there, None among the masks"):
        Start(moved.path, masks.subset([other for other in masks if other != name]))
    with pytest.raises(ValueError, match=rf"`{name}`: \(64, 32\) there, \(32, 64\) among"):
        Start(moved.path, Masks({**masks, name: masks[name].T}))
    with pytest.raises(ValueError, match="start weights need to be zero where they are pruned"):
        apply(model, random_masks(model), moved)


# --- the exact solution -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_exact_start_is_the_matrix_scopes_result_with_its_solver(family: str, tmp_path: Path) -> None:
    scope = prepared(MatrixReconstruction(name=save_tiny(family, tmp_path), batch_size=4, solver=START_SOLVER))
    model = tiny(family)
    before = weights_of(model)
    found = exact_of(model, scope.masks)
    expected = fit(scope)
    assert found.keys() == scope.masks.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert same(weights_of(model), before)  # left dense


def test_the_exact_start_leaves_out_what_is_not_pruned(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llama")
    masks = random_masks(model, exclude=("model.layers.0.*", "*.down_proj"))
    caplog.set_level("INFO", "recon")
    found: dict[str, Tensor] = {}
    solve_all(Replay(model, Anatomy.of(model)), data_of().tokens("train"), masks, found.__setitem__)
    lines = list(caplog.messages)
    everything = exact_of(model, random_masks(model))
    assert found.keys() == masks.keys() < everything.keys()
    assert [line.split("  ")[1:3] for line in lines] == [
        ["block 2/3", "6 matrices solved"],
        ["block 3/3", "6 matrices solved"],
    ]


def test_the_exact_start_needs_matrices_of_blocks() -> None:
    model = tiny("llama")
    masks = Masks({"model.embed_tokens.weight": torch.rand(model.get_input_embeddings().weight.shape) < 0.5})
    with pytest.raises(ValueError, match=r"belong to none, model\.embed_tokens\.weight the first; exclude"):
        exact_of(model, masks)


# --- every scope's first forward pass -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "start"),
    [
        (kind, start)
        for kind in SCOPES
        for start in ("pruned", "moved", "exact")
        if (kind, start) != ("matrix", "exact")
    ],
)
@pytest.mark.parametrize("family", [slow("gpt2"), "phi"])
def test_recovery_starts_from_the_weights_asked_for(start: str, kind: str, family: str, tmp_path: Path) -> None:
    name, dense = save_tiny(family, tmp_path), tiny(family)
    masks, moved = moved_of(dense, tmp_path)
    expected = dict(moved) if start == "moved" else exact_of(dense, masks) if start == "exact" else {}
    scope, first = SCOPES[kind](name=name, start=start), FirstForward()
    scope.load(data := data_of(batch_size=4))
    scope.prepare(data, masks, moved=moved)
    weights = fit(scope, first)
    dense_weights = weights_of(dense)
    assert first.weights.keys() >= masks.keys()
    for one, weight in first.weights.items():
        if one in masks:
            expected_one = expected.get(one, dense_weights[one].masked_fill(~masks[one], 0))
            assert torch.equal(weight, expected_one), one
            assert not weights[one][~masks[one]].any()
        else:
            assert torch.equal(weight, dense_weights[one]), one


@pytest.mark.parametrize("kind", ["submodule", "two blocks", "matrix"])
def test_the_error_before_recovery_is_that_of_the_start(kind: str, tmp_path: Path) -> None:
    name = save_tiny("llama", tmp_path)
    masks, moved = moved_of(tiny("llama"), tmp_path)
    before: dict[str, list[float]] = {}
    for start in ("pruned", "moved", *(["exact"] if kind != "matrix" else [])):
        rate = {} if kind == "matrix" else {"lr": 1e-3}
        scope = SCOPES[kind](name=name, start=start, **rate)
        assert isinstance(scope, LocalScope)
        scope.load(data := data_of(num=64))
        scope.prepare(data, masks, moved=moved)
        fit(scope)
        before[start] = [result["before"] for result in scope.results.values()]
        assert all(result["after"] < result["before"] for result in scope.results.values())
    for start in before.keys() - {"pruned"}:
        assert all(new < old for new, old in zip(before[start], before["pruned"], strict=True)), start


def test_a_matrix_that_starts_from_moved_weights_ends_at_the_same_optimum(tmp_path: Path) -> None:
    masks, moved = moved_of(tiny("llama"), tmp_path, ALPS())
    solved = {}
    for start in ("pruned", "moved"):
        scope = MatrixReconstruction(name=save_tiny("llama", tmp_path), start=start)  # type: ignore[arg-type]
        scope.load(data := data_of(num=64))
        scope.prepare(data, masks, moved=moved)
        fit(scope)
        solved[start] = {k: v for result in scope.results.values() for k, v in result["matrices"].items()}
    for name, one in solved["moved"].items():
        assert one["relative_error"] == pytest.approx(solved["pruned"][name]["relative_error"], rel=1e-3)
    assert sum(one["iterations"] for one in solved["moved"].values()) < sum(
        one["iterations"] for one in solved["pruned"].values()
    )


def test_the_teacher_stays_dense(tmp_path: Path) -> None:
    class Teacher(Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            self.weights = weights_of(pl_module._teacher[0])

    teacher = Teacher()
    scope = prepared(SCOPES["full distillation"](name=save_tiny("llama", tmp_path), start="exact"))
    fit(scope, teacher)
    assert same(teacher.weights, weights_of(tiny("llama")))


# --- going on after a kill ----------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "steps"), [("submodule", 2), ("submodule", 7), ("two blocks", 4)])
def test_a_killed_run_takes_the_exact_start_that_it_had(kind: str, steps: int, tmp_path: Path) -> None:
    name = save_tiny("gpt2", tmp_path)
    expected = fit(prepared(SCOPES[kind](name=name, start="exact")))
    with pytest.raises(Killed):
        fit(prepared(SCOPES[kind](name=name, start="exact"), directory=tmp_path), Kill(steps))
    again = prepared(SCOPES[kind](name=name, start="exact"), directory=tmp_path)
    assert same(fit(again), expected)


def test_an_exact_start_that_was_killed_is_solved_again(tmp_path: Path) -> None:
    name = save_tiny("llama", tmp_path)
    with mock.patch("recon.scopes.exact.solve", side_effect=Killed), pytest.raises(Killed):
        prepared(SCOPES["full"](name=name, start="exact"), directory=tmp_path)
    assert not (RunPaths(tmp_path).start).exists()
    scope = SCOPES["full"](name=name, start="exact")
    phases: list[str] = []
    scope.phases = Phases()
    with mock.patch.object(scope.phases, "enter", phases.append):
        prepared(scope, directory=tmp_path)
    assert phases == ["start"]
    assert same(dict(Start(RunPaths(tmp_path).start, scope.masks)), exact_of(tiny("llama"), scope.masks))
    assert scope.start_seconds > 0


# --- what is refused ----------------------------------------------------------------------------------


def test_combinations_without_a_meaning_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"exact is what the matrix scope ends at; choose"):
        MatrixReconstruction(start="exact")
    with pytest.raises(ValueError, match=r"exact solves on the whole model, which model\.partitioned never loads"):
        FullRetraining(partitioned=True, start="exact")
    with pytest.raises(ValueError, match=r"there are none with these masks; choose a criterion that moves weights"):
        prepared(SCOPES["full"](name=save_tiny("llama", tmp_path), start="moved"))


# --- runs ---------------------------------------------------------------------------------------------

DATA = ["--data.num_sequences=8", "--data.seq_len=32", "--data.num_validation=4", "--data.num_test=8"]
COMMON = [*random_model(TIED_LLAMA), *DATA, "--summary=false"]
SPARSEGPT = ["--criterion=SparseGPT"]


def recon_fit(scope: str, run_dir: Path, *args: str) -> int:
    epochs = [] if scope == "matrix" else ["--model.epochs=1"]
    return main(["fit", "-c", f"scopes/{scope}", "--run_dir", str(run_dir), *COMMON, *epochs, *args])


def report_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "report.json").read_text())


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `recon prune` writes with SparseGPT."""
    directory = tmp_path_factory.mktemp("pruned") / "run"
    assert main(["prune", "--run_dir", str(directory), "--save_model=true", *COMMON, *SPARSEGPT]) == 0
    return directory


def test_the_pruned_model_of_sparsegpt_has_the_moved_weights(pruned: Path, tmp_path: Path) -> None:
    masks, written_model = Masks.load(pruned / "masks.safetensors"), load_file(pruned / "model" / "model.safetensors")
    moved = moved_with(pruned / "masks.safetensors", masks)
    assert moved is not None
    assert all(torch.equal(written_model[name], moved[name]) for name in masks)
    assert all((moved[name] != 0).equal(masks[name]) for name in masks)
    assert main(["test", str(pruned / "model"), "--run_dir", str(tmp_path / "tested"), *DATA]) == 0
    assert report_of(tmp_path / "tested")["perplexity"] == report_of(pruned)["perplexity"]
    assert recon_fit("matrix", tmp_path / "own", *SPARSEGPT) == 0  # prunes itself
    assert same(load_file(RunPaths(tmp_path / "own").moved), dict(moved))
    assert report_of(tmp_path / "own")["pruned_perplexity"] == report_of(pruned)["perplexity"]


@pytest.mark.parametrize("scope", ["submodule", slow("full")])
def test_masks_bring_their_moved_weights_along(scope: str, pruned: Path, tmp_path: Path) -> None:
    given = ["--masks", str(pruned / "masks.safetensors"), "--model.start=moved"]
    run = tmp_path / "run"
    assert recon_fit(scope, run, *given) == 0
    report = report_of(run)
    assert report["pruned_perplexity"] == report_of(pruned)["perplexity"]
    assert (report["criterion"], report["mask_violations"]) == ("sparsegpt", 0)
    assert not (RunPaths(run).moved).exists()
    # A run's masks know where the moved weights are that came with them.
    second = ["--masks", str(run / "masks.safetensors"), "--model.start=moved"]
    assert recon_fit(scope, tmp_path / "second", *second) == 0
    assert report_of(tmp_path / "second")["perplexity"] == report["perplexity"]


@pytest.mark.slow
def test_an_exact_start_is_part_of_the_recovery(tmp_path: Path) -> None:
    run = tmp_path / "run"
    solve_start = FullRetraining.solve_start

    def taking_an_hour(self: FullRetraining) -> Any:
        found = solve_start(self)
        assert 0 < self.start_seconds < 3600
        self.start_seconds = 3600.0
        return found

    with (
        mock.patch("recon.experiment.directory.RunDirectory.clean"),  # keeps the file
        mock.patch.object(FullRetraining, "solve_start", taking_an_hour),
    ):
        assert recon_fit("full", run, "--model.start=exact", "--baselines=false") == 0
    phases = json.loads((run / "memory.json").read_text())["phases"]
    assert [phase["phase"] for phase in phases][:4] == ["load", "prune", "prepare", "start"]
    assert report_of(run)["seconds"] > 3600
    assert set(load_file(RunPaths(run).start)) == set(Masks.load(run / "masks.safetensors"))
    other = tmp_path / "other"
    assert recon_fit("full", other, "--model.start=exact", "--baselines=false") == 0
    assert not (RunPaths(other).start).exists()  # as large as the model, and of no more use


WRONG = {
    "wanda moves none": (["--model.start=moved"], r"and wanda moves none; choose a criterion that moves weights"),
    "no criterion": (["--model.start=moved", "--criterion=null", "--pattern=null"], "and no criterion moves none"),
    "nonsense": (["--model.start=dense"], "pruned.*moved.*exact"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_starts_that_cannot_be_had_are_refused_before_anything_is_pruned(
    wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, message = WRONG[wrong]
    assert recon_fit("submodule", tmp_path / "run", *options) == 2
    error = capsys.readouterr().err
    assert re.search(message, error, re.DOTALL), error
    assert "Traceback" not in error
    assert not (tmp_path / "run" / "masks.safetensors").exists()


@pytest.mark.slow
def test_moved_weights_that_are_gone_are_missed(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "masks.safetensors").write_bytes((pruned / "masks.safetensors").read_bytes())
    given = ["--masks", str(tmp_path / "masks.safetensors")]
    for options in (["--model.start=moved", "--baselines=false"], ["--model.start=pruned"]):
        assert recon_fit("full", tmp_path / options[0], *given, *options) == 1
        error = capsys.readouterr().err
        assert (
            f"those of sparsegpt, which moves weights, and need {RunPaths(tmp_path).moved}, which does not exist"
            in error
        )
    assert recon_fit("full", tmp_path / "unneeded", *given, "--model.start=pruned", "--baselines=false") == 0
    save_file({"x": torch.zeros(2)}, RunPaths(tmp_path).moved)
    assert recon_fit("full", tmp_path / "other", *given, "--model.start=moved") == 1
    assert "start weights need the names and shapes of the masks" in capsys.readouterr().err


# --- several processes --------------------------------------------------------------------------------


def fit_and_watch(run_dir: Path, options: list[str]) -> tuple[int, dict[str, Tensor]]:
    """A run in connected processes: how often this one solved for the start, and the weights before its first step."""
    from recon.cli import fit as command
    from recon.distributed.parameters import whole

    seen: dict[str, Tensor] = {}
    recover, solve = command.recover, mock.Mock(wraps=solve_all)

    class First(Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            for name, parameter in pl_module.model.named_parameters():
                if name in pl_module.masks:
                    with whole(parameter) as weight:
                        seen[name] = weight.clone()

    def watched(scope: Any, data: Any, trainer: Any, *more: Any) -> Any:
        trainer.callbacks.insert(0, First())
        return recover(scope, data, trainer, *more)

    with mock.patch.object(command, "recover", watched), mock.patch("recon.scopes.base.solve_all", solve):
        command.main(["-c", "scopes/full", *options, "--run_dir", str(run_dir), "--trainer.devices=2"])
    return solve.call_count, seen


SHARED = [*COMMON, "--model.epochs=1", "--data.batch_size=2", "--trainer.accelerator=cpu"]
SHARED += ["--trainer.precision=32-true"]


@pytest.mark.slow
def test_one_process_solves_for_the_start_and_all_have_it(tmp_path: Path) -> None:
    masks = ["--masks", str(tmp_path / "pruned" / "masks.safetensors"), "--baselines=false"]
    assert main(["prune", "--run_dir", str(tmp_path / "pruned"), *COMMON]) == 0
    options = [*SHARED, *masks, "-c", "strategies/ddp", "--model.start=exact"]
    (solved, first), (not_solved, second) = in_processes(fit_and_watch, tmp_path / "two", options)
    assert (solved, not_solved) == (1, 0)
    assert same(first, second)
    solver = ["--model.solver", "ConjugateGradients", "--model.solver.improvement", "1e-2"]
    assert recon_fit("matrix", tmp_path / "one", *masks, *solver) == 0
    exact = load_file(tmp_path / "one" / "model" / "model.safetensors")
    reset = {int(name) for name, errors in report_of(tmp_path / "one")["windows"].items() if "discarded" in errors}
    solved_too = {name: one for name, one in first.items() if int(name.split(".")[2]) not in reset}
    assert len(first) == 14
    assert solved_too
    for name, weight in solved_too.items():  # Gram matrices of other batch sizes, and rows that stop elsewhere
        assert (weight - exact[name]).norm() < 0.05 * exact[name].norm()


@pytest.mark.slow
def test_a_partitioned_model_starts_from_moved_weights(pruned: Path, tmp_path: Path) -> None:
    options = [*SHARED, "-c", "strategies/zero3", "--trainer.strategy.init_args.min_partitioned=0"]
    options += ["--masks", str(pruned / "masks.safetensors"), "--baselines=false"]
    options += ["--model.partitioned=true", "--model.start=moved"]
    moved = load_file(RunPaths(pruned).moved)
    for solved, first in in_processes(fit_and_watch, tmp_path / "run", options):
        assert solved == 0
        assert same(first, moved)
