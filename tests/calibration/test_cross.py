"""Recovered inputs with dense targets: what every solver finds and reports, against the outputs themselves."""

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from recon.calibration.statistics import InputStatistics
from recon.models.matrices import Matrix
from recon.pruning.patterns import Unstructured
from recon.scopes.exact import START_SOLVER, solve
from recon.solvers import ADMMSolver, ConjugateGradients, GradientDescent, LeastSquares, Solver, relative_objective
from tests.support import references
from tests.support.reconstruction_fixtures import distance, golden_layer

SOLVERS = [
    ConjugateGradients(),
    ConjugateGradients(max_iterations=3),
    ConjugateGradients(max_iterations=0),
    ADMMSolver(),
    ADMMSolver(iterations=3, rho=0.3, damping=0.0),
]


class Pair:
    """One matrix, what enters it in the recovered model (X) and in the dense one (X_d)."""

    def __init__(self, drift: float = 0.3, out: int = 12, in_: int = 20, num_tokens: int = 150, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.X_d = torch.randn(num_tokens, in_, generator=generator) @ torch.randn(in_, in_, generator=generator)
        self.X = self.X_d * (1 + drift * torch.randn(num_tokens, in_, generator=generator)) + drift
        self.dense = torch.randn(out, in_, generator=generator)
        self.keep = Unstructured(0.5).select(self.dense.abs() * self.X.norm(dim=0))
        self.start = torch.randn(out, in_, generator=generator) * self.keep

    @property
    def problem(self) -> LeastSquares:
        cross = self.X_d.double().T @ self.X.double()
        grams = (references.gram(self.X), cross, references.gram(self.X_d))
        gram, cross, dense_gram = (tensor.float() for tensor in grams)
        return LeastSquares.of(InputStatistics(len(self.X), None, gram, cross, dense_gram), self.dense)

    @property
    def exact(self) -> torch.Tensor:
        return references.masked_least_squares(self.dense, self.X, self.keep, self.X_d)

    def errors(self, weight: torch.Tensor) -> torch.Tensor:
        return references.cross_errors(weight, self.dense, self.X, self.X_d)

    @property
    def energies(self) -> torch.Tensor:
        return self.errors(torch.zeros_like(self.dense))

    def relative_error(self, weight: torch.Tensor) -> float:
        return float(self.errors(weight).sum() / self.energies.sum())


@pytest.mark.parametrize("drift", [1e-3, 0.3, 3.0])
def test_conjugate_gradients_find_the_optimum(drift: float) -> None:
    pair = Pair(drift)
    solution = ConjugateGradients().solve(pair.problem, pair.keep)
    torch.testing.assert_close(solution.weight.double(), pair.exact, rtol=1e-3, atol=1e-3)
    assert (solution.weight[~pair.keep] == 0).all()
    assert solution.projected_gradient < 1e-6
    assert solution.relative_error == pytest.approx(pair.relative_error(pair.exact), rel=1e-4)
    with_dense_targets_ignored = ConjugateGradients().solve(LeastSquares(pair.problem.gram, pair.dense), pair.keep)
    assert pair.relative_error(solution.weight) < pair.relative_error(with_dense_targets_ignored.weight)


@pytest.mark.parametrize("drift", [1e-3, 0.3, 3.0])
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_what_is_reported_is_what_is_returned(solver: Solver, drift: float) -> None:
    pair = Pair(drift)
    solution = solver.solve(pair.problem, pair.keep, pair.start)
    gradient = references.cross_gradient(solution.weight, pair.dense, pair.X, pair.X_d, pair.keep)
    assert solution.projected_gradient == pytest.approx(gradient, rel=1e-3, abs=1e-6)
    assert solution.relative_error == pytest.approx(pair.relative_error(solution.weight), rel=1e-4)
    measured = pair.problem.measure(solution.weight, pair.keep)
    assert measured == (solution.relative_error, solution.projected_gradient)
    assert solution.seconds > 0


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_without_a_cross_term_too(solver: Solver) -> None:
    pair = Pair()
    solution = solver.solve(LeastSquares(references.gram(pair.X), pair.dense), pair.keep, pair.start)
    gradient = references.projected_gradient(solution.weight, pair.dense, pair.X, pair.keep)
    assert solution.projected_gradient == pytest.approx(gradient, rel=1e-3, abs=1e-6)
    error = references.relative_error(solution.weight, pair.dense, pair.X)
    assert solution.relative_error == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_without_drift_it_is_the_same_problem(solver: Solver) -> None:
    pair = Pair()
    gram = references.gram(pair.X).float()
    plain = solver.solve(LeastSquares(gram, pair.dense), pair.keep, pair.start)
    crossed = solver.solve(LeastSquares(gram, pair.dense, gram, gram), pair.keep, pair.start)
    torch.testing.assert_close(crossed.weight, plain.weight, rtol=1e-4, atol=1e-5)
    assert crossed.relative_error == pytest.approx(plain.relative_error, rel=1e-6)  # differences first


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("begin_at", ["random", "optimum"])
@pytest.mark.parametrize("solver", [*SOLVERS, ADMMSolver(damping=10.0)], ids=repr)
def test_no_row_is_worse_than_its_start(solver: Solver, begin_at: str, seed: int) -> None:
    pair = Pair(seed=seed)
    start = pair.start if begin_at == "random" else pair.exact.float()
    solution = solver.solve(pair.problem, pair.keep, start)
    assert (pair.errors(solution.weight) <= pair.errors(start) + 1e-6 * pair.energies).all()


def test_the_fixed_point_of_admm_is_damped_least_squares() -> None:
    """Damping is ridge regression towards the dense weight, in units in which every input has norm 1."""
    pair = Pair()
    exact, damped = Pair(), Pair()
    ridge = 0.1**0.5 * pair.X.norm(dim=0).diag()
    damped.X, damped.X_d = torch.cat([pair.X, ridge]), torch.cat([pair.X_d, ridge])
    for damping, expected in ((0.0, exact.exact), (0.1, damped.exact)):
        distances = [
            distance(ADMMSolver(n, damping=damping).solve(pair.problem, pair.keep).weight.double(), expected)
            for n in (0, 20, 5000)
        ]
        assert distances[2] < 1e-3
        assert distances[2] < distances[1] < distances[0]


@pytest.mark.parametrize("layer", ["a", "b"])
def test_admm_is_the_published_one_from_the_dense_or_the_pruned_weight(layer: str) -> None:
    weight, X, published = golden_layer(layer)
    expected = published["admm.fixedmask.rowwise50"]
    keep = Unstructured(0.5).select(weight.abs() * X.norm(dim=0))
    problem = LeastSquares(X.T @ X, weight)
    for start in (None, weight, weight * keep):
        assert distance(ADMMSolver().solve(problem, keep, start).weight, expected) < 1e-5
    ended = ADMMSolver().solve(problem, keep, ConjugateGradients().solve(problem, keep).weight)
    assert ended.relative_error < references.relative_error(expected, weight, X)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_inputs_that_never_occur_keep_the_start(solver: Solver) -> None:
    """Also those that occur in the dense model, where its outputs need them."""
    pair = Pair()
    pair.X[:, [2, 5]] = 0
    pair.X_d[:, 2] = 0
    solution = solver.solve(pair.problem, pair.keep, pair.start)
    assert torch.equal(solution.weight[:, [2, 5]], pair.start[:, [2, 5]])
    weight = pair.start.clone().requires_grad_()
    relative_objective(pair.problem, weight).backward()
    assert weight.grad is not None
    assert not weight.grad[:, [2, 5]].any()


def test_an_error_that_can_be_made_up_for_is_not_negative() -> None:
    for seed in range(8):  # rounding takes it to -3e-8 in most
        pair, generator = Pair(seed=seed), torch.Generator().manual_seed(seed)
        mixing = torch.eye(20) + 0.1 * torch.randn(20, 20, generator=generator)
        pair.X = pair.X_d @ mixing
        weight = torch.linalg.solve(mixing, pair.dense.T).T.contiguous()
        error, gradient = pair.problem.measure(weight, torch.ones_like(pair.keep))
        assert 0 <= error < 1e-6
        assert gradient < 1e-6


@pytest.mark.parametrize("with_cross", [True, False])
def test_the_objective_and_its_gradient_are_those_of_the_outputs(with_cross: bool) -> None:
    pair = Pair()
    if not with_cross:
        pair.X_d = pair.X
    problem = pair.problem if with_cross else LeastSquares(pair.problem.gram, pair.dense)
    with torch.inference_mode():
        problem.measure(pair.start, pair.keep)  # what it leaves behind may enter a graph
    weight = pair.start.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        objective = relative_objective(problem, weight)
    objective.backward()
    assert objective.dtype == torch.float32
    assert objective.item() == pytest.approx(pair.relative_error(pair.start), rel=1e-5)
    obvious = pair.start.double().requires_grad_()
    (pair.errors(obvious).sum() / pair.energies.sum()).backward()
    assert weight.grad is not None
    assert obvious.grad is not None
    torch.testing.assert_close(weight.grad.double(), obvious.grad, rtol=1e-4, atol=1e-6)


def test_steps_of_gradient_descent_end_at_the_optimum() -> None:
    pair, settings = Pair(), GradientDescent(lr=0.03)
    problem, weight = pair.problem, pair.start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([weight], lr=settings.lr, betas=settings.betas, weight_decay=0.0)
    for _ in range(5 * settings.steps):
        optimizer.zero_grad()
        relative_objective(problem, weight * pair.keep).backward()
        optimizer.step()
    assert problem.measure(weight.detach() * pair.keep, pair.keep)[0] == pytest.approx(
        pair.relative_error(pair.exact), rel=0.02
    )


def test_a_matrix_without_inputs_is_exact() -> None:
    nothing = torch.zeros(4, 4)
    dense, keep = torch.ones(3, 4), torch.ones(3, 4, dtype=torch.bool)
    for problem in (LeastSquares(nothing, dense), LeastSquares(nothing, dense, nothing, nothing)):
        solution = ConjugateGradients().solve(problem, keep)
        assert (solution.relative_error, solution.projected_gradient, solution.iterations) == (0.0, 0.0, 0)
        assert relative_objective(problem, dense) == 0


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_everything_is_fp32_and_arguments_are_left_alone(solver: Solver) -> None:
    pair = Pair()
    pair.dense = pair.dense.bfloat16()
    problem = pair.problem
    copies = [t.clone() for t in (problem.gram, problem.cross, problem.dense_gram, pair.start) if t is not None]
    solution = solver.solve(problem, pair.keep, pair.start)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        again = solver.solve(problem, pair.keep, pair.start)
    assert solution.weight.dtype == torch.float32
    assert torch.equal(solution.weight, again.weight)
    tensors = (problem.gram, problem.cross, problem.dense_gram, pair.start)
    assert all(torch.equal(a, b) for a, b in zip(copies, tensors, strict=True) if b is not None)


def test_a_module_is_solved_in_its_own_layout_by_the_solver_asked_for() -> None:
    pair = Pair()
    module = Conv1D(*pair.dense.shape)
    module.weight.data = pair.dense.T.contiguous()
    matrix = Matrix.of_module("m", module)
    found = pair.problem
    statistics = InputStatistics(len(pair.X), None, found.gram, found.cross, found.dense_gram)
    for solver in (ConjugateGradients(), ADMMSolver()):
        solution = solve(matrix, statistics, pair.keep, solver)
        assert torch.equal(solution.weight, solver.solve(found, pair.keep, pair.dense).weight)
    assert torch.equal(
        solve(matrix, statistics, pair.keep).weight,
        START_SOLVER.solve(found, pair.keep, pair.dense).weight,
    )


@pytest.mark.parametrize("argument", ["gram", "cross", "dense_gram"])
@pytest.mark.parametrize("solver", [ConjugateGradients(), ADMMSolver()], ids=str)
def test_numbers_that_are_not_finite_are_refused_by_name(solver: Solver, argument: str) -> None:
    pair = Pair()
    problem = pair.problem
    getattr(problem, argument)[1, 1] = float("nan")
    with pytest.raises(ValueError, match=f"NaN or Inf in `{argument}` of `q_proj`"):
        solver.solve(problem, pair.keep, name="q_proj")


@pytest.mark.parametrize("solver", [ConjugateGradients(), ADMMSolver()], ids=str)
def test_overflow_is_refused_by_name(solver: Solver) -> None:
    pair = Pair()
    with pytest.raises(ValueError, match=r"NaN or Inf in `(solution|objective)` of `q_proj`"):
        solver.solve(LeastSquares(pair.problem.gram * 1e34, pair.dense * 1e5), pair.keep, name="q_proj")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (ConjugateGradients, {"tolerance": -1e-6}),
        (ConjugateGradients, {"tolerance": 1.0}),
        (ConjugateGradients, {"tolerance": float("nan")}),
        (ConjugateGradients, {"max_iterations": -1}),
        (ADMMSolver, {"iterations": -1}),
        (ADMMSolver, {"rho": 0.0}),
        (ADMMSolver, {"rho": float("inf")}),
        (ADMMSolver, {"damping": -0.1}),
        (ADMMSolver, {"damping": float("nan")}),
        (GradientDescent, {"steps": 0}),
        (GradientDescent, {"lr": 0.0}),
        (GradientDescent, {"lr": float("nan")}),
        (GradientDescent, {"betas": (0.9, 1.0)}),
        (GradientDescent, {"betas": (-0.1, 0.9)}),
        (GradientDescent, {"warmup": 1.0}),
        (GradientDescent, {"warmup": float("nan")}),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(method: type, options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"needs? .*, got .*; "):
        method(**options)


def test_names_are_short() -> None:
    names = [str(method) for method in (ConjugateGradients(), ADMMSolver(), GradientDescent())]
    assert names == ["cg", "admm", "gradient descent"]
