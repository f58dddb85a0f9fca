"""What each criterion and solver costs on one matrix, and what it loses.

    python tests/benchmarks/criteria.py                 # a 2048 x 2048 layer, minutes; --quick for fewer iterations
    python tests/benchmarks/criteria.py --golden        # errors on the layers in tests/golden, seconds

Times are given as multiples of one dense size^3 product in fp32 too, measured just before and after: those hold
roughly on other machines, and on this one while it has other work.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from recon.basics.files import write_json
from recon.calibration.statistics import InputStatistics, full_fp32
from recon.experiment.environment import environment
from recon.pruning.criteria import ADMM, ALPS, RIA, Criterion, Magnitude, Random, SparseFW, SparseGPT, Wanda
from recon.pruning.patterns import NM, Pattern, Unstructured
from recon.pruning.refinement import Refined, Swaps
from recon.solvers import ADMMSolver, ConjugateGradients, LeastSquares, Solver

GOLDEN = Path(__file__).parents[1] / "golden"

PATTERNS: dict[str, Pattern] = {
    "50 % per row": Unstructured(0.5),
    "60 % per row": Unstructured(0.6),
    "70 % per row": Unstructured(0.7),
    "2:4": NM(2, 4),
}

REFINED = (Refined(Wanda(), Swaps("fixed")), Refined(Wanda(), Swaps()), Refined(ALPS(), Swaps()))

CRITERIA = (Magnitude(), Wanda(), RIA(), SparseGPT(), SparseFW(), ADMM(), ALPS(), Random(), *REFINED)

SHORT = 2.0
"""Seconds below which a run is repeated."""

GOALS = "Goals for 2048 on two cores: wanda 0.3 s, sparsegpt 10 s, exact solve to 1e-04 in 60 products."


@dataclass(frozen=True)
class Row:
    """One criterion or solver on one layer.

    Args:
        label: What was run.
        seconds: That it took; the median of three runs if the first was shorter than `SHORT`.
        product_seconds: Of one dense size^3 product, the median of six around it.
        relative_error: tr(E G E^T) / tr(W0 G W0^T), E = W - W0.
        projected_gradient: ||M * (E G)||_F / ||M * (W0 G)||_F, zero at the optimum for the mask M.
        iterations: None if it has none or does not say.
    """

    label: str
    seconds: float
    product_seconds: float
    relative_error: float
    projected_gradient: float
    iterations: int | None

    @property
    def products(self) -> float:
        """The time as a multiple of the product's."""
        return self.seconds / self.product_seconds


def main(arguments: list[str] | None = None) -> None:
    """Measure, print markdown, write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", action="store_true", help="errors on the golden layers instead")
    parser.add_argument("--size", type=int, default=2048, help="in and out features of the layer")
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument("--seed", type=int, default=0, help="of the layer")
    parser.add_argument("--quick", action="store_true", help="20 iterations of SparseFW and at most 20 of ALPS")
    parser.add_argument("--json", type=Path, help="a file to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    record: dict[str, Any] = {"environment": environment(options.device)}
    if options.golden:
        record["golden"] = {title: golden_errors(pattern) for title, pattern in PATTERNS.items()}
        print("\n\n".join(golden_table(title, errors) for title, errors in record["golden"].items()))
    else:
        rows = measure(options.size, options.seed, options.device, options.quick)
        record |= {"size": options.size, "seed": options.seed, "quick": options.quick, "pattern": "50 % per row"}
        record["rows"] = [asdict(row) | {"products": row.products} for row in rows]
        print(rows_table(rows, options.size, record["environment"]))
    if options.json is not None:
        write_json(options.json, record)


def golden_errors(pattern: Pattern) -> dict[str, list[float]]:
    """Criterion -> relative errors of layer a, a with the exact solve, b, b with the exact solve."""
    errors: dict[str, list[float]] = {str(criterion): [] for criterion in CRITERIA}
    for layer in ("layer_a", "layer_b"):
        tensors = load_file(GOLDEN / f"{layer}.safetensors")
        X, dense = tensors["inputs"].flatten(0, 1), tensors["weight"]
        inputs = InputStatistics(len(X), gram=X.T @ X)
        exact_gram = X.double().T @ X.double()
        for criterion in CRITERIA:
            weight, keep = criterion.prune(dense, inputs, pattern, layer)
            solution = ConjugateGradients().solve(LeastSquares.of(inputs, dense), keep, weight, layer)
            for result in (weight * keep, solution.weight):
                errors[str(criterion)].append(quality(result, dense, exact_gram, keep)[0])
    return errors


def measure(size: int, seed: int, device: torch.device, quick: bool) -> list[Row]:
    """Run every criterion and solver on the heavy-tailed layer, at 50 % per row."""
    say(f"making the {size} x {size} layer")
    dense, gram = (tensor.to(device) for tensor in heavy_tailed_layer(size, seed))
    inputs, pattern = InputStatistics(4 * size, gram=gram), PATTERNS["50 % per row"]
    name = f"a {size} x {size} layer"
    keep = Wanda().prune(dense, inputs, pattern, name)[1]

    def prune(criterion: Criterion) -> Callable[[], tuple[Tensor, Tensor, int | None]]:
        iterations = criterion.iterations if isinstance(criterion, SparseFW | ADMM) else None
        return lambda: (*criterion.prune(dense, inputs, pattern, name), iterations)

    def solve(solver: Solver) -> tuple[Tensor, Tensor, int | None]:
        solution = solver.solve(LeastSquares(gram, dense), keep, name=name)
        return solution.weight, keep, solution.iterations

    def swap(swaps: Swaps) -> tuple[Tensor, Tensor, int | None]:
        refined, products = swaps.improve(dense, gram, dense, keep, None)
        say(f"  {products:.1f} products of matrices, {int((refined & ~keep).sum()) / size:.1f} exchanges a row")
        return dense, refined, None

    sparsefw, alps = (SparseFW(iterations=20), ALPS(max_iterations=20)) if quick else (SparseFW(), ALPS())
    runs: dict[str, Callable[[], tuple[Tensor, Tensor, int | None]]] = {
        "magnitude": prune(Magnitude()),
        "wanda": prune(Wanda()),
        "ria": prune(RIA()),
        "random": prune(Random()),
        "sparsegpt": prune(SparseGPT()),
        f"sparsefw, {sparsefw.iterations} iterations": prune(sparsefw),
        "admm": prune(ADMM()),
        f"alps, at most {alps.max_iterations} iterations": prune(alps),
        "masks of swaps from wanda's, fixed": lambda: swap(Swaps("fixed")),
        "masks of swaps from wanda's, exact": lambda: swap(Swaps()),
        "wanda + swaps, with their exact solve": prune(Refined(Wanda(), Swaps())),
        "wanda + 20 iterations of admm, fixed mask": lambda: solve(ADMMSolver(iterations=20)),
        "wanda + exact solve to 1e-04": lambda: solve(ConjugateGradients(tolerance=1e-4)),
        "wanda + exact solve to 1e-06": lambda: solve(ConjugateGradients(tolerance=1e-6)),
    }
    rows, exact_gram = [], gram.double()
    before = product_seconds(dense, gram)
    for label, run in runs.items():
        say(label)
        seconds, (weight, kept, iterations) = stopwatch(run, device)
        if seconds < SHORT:
            seconds = statistics.median([seconds, *(stopwatch(run, device)[0] for _ in range(2))])
        after = product_seconds(dense, gram)
        error, gradient = quality(weight * kept, dense, exact_gram, kept)
        rows.append(Row(label, seconds, statistics.median(before + after), error, gradient, iterations))
        say(f"  {seconds:.2f} s, {rows[-1].products:.1f} products, relative error {error:.5f}")
        before = after
    return rows


def heavy_tailed_layer(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """The weight W0 and the Gram matrix G of 4 * size tokens, with what makes a language model's inputs hard.

    Tokens follow a multivariate Student-t with 3 degrees of freedom whose covariance has the eigenvalues 1/j and
    random eigenvectors. Channels have log-normal scales, and one in 128 is an outlier, 10 to 100 times larger.
    """
    generator = torch.Generator().manual_seed(seed)
    num_tokens, num_outliers = 4 * size, max(1, size // 128)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
    normal = torch.randn(num_tokens, size, generator=generator) / torch.arange(1, size + 1).sqrt()
    chi_square = torch.randn(num_tokens, 3, generator=generator).square().sum(1, keepdim=True)
    scales = torch.exp(0.5 * torch.randn(size, generator=generator))
    outliers = torch.randperm(size, generator=generator)[:num_outliers]
    scales[outliers] *= 10 ** (1 + torch.rand(num_outliers, generator=generator))
    X = (normal / (chi_square / 3).sqrt()) @ basis * scales
    return torch.randn(size, size, generator=generator) / size**0.5, X.T @ X


def quality(weight: Tensor, dense: Tensor, gram: Tensor, keep: Tensor) -> tuple[float, float]:
    """The relative error and the relative projected gradient, fp64."""
    dense, G = dense.double(), gram.double()
    E, H = weight.double() - dense, dense @ G
    E_G = E @ G
    return float((E * E_G).sum() / (dense * H).sum()), float((E_G * keep).norm() / (H * keep).norm())


def product_seconds(dense: Tensor, gram: Tensor) -> list[float]:
    """Three times of one dense product in fp32, after one that is not counted."""
    with full_fp32(dense.device):
        return [stopwatch(lambda: dense @ gram, dense.device)[0] for _ in range(4)][1:]


def stopwatch(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds that a call took, and its result."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def golden_table(title: str, errors: dict[str, list[float]]) -> str:
    """Markdown, a line per criterion."""
    lines = [f"| {title} | layer_a | + exact solve | layer_b | + exact solve |", "|---|---|---|---|---|"]
    lines += [f"| {name} | " + " | ".join(f"{error:.5f}" for error in row) + " |" for name, row in errors.items()]
    return "\n".join(lines)


def rows_table(rows: list[Row], size: int, machine: dict[str, Any]) -> str:
    """Markdown, a line per run, and below it where it ran."""
    lines = [
        f"| {size} x {size}, 50 % per row | seconds | products | relative error | iterations | projected gradient |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        iterations = "" if row.iterations is None else row.iterations
        lines.append(
            f"| {row.label} | {row.seconds:.2f} | {row.products:.1f} | {row.relative_error:.5f} | {iterations} | "
            f"{row.projected_gradient:.1e} |"
        )
    product = statistics.median(row.product_seconds for row in rows)
    lines += ["", f"One product took {product:.3f} s on {machine['device']}, {machine['threads']} threads. {GOALS}"]
    return "\n".join(lines)


def say(message: str) -> None:
    """Progress, apart from the table."""
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
