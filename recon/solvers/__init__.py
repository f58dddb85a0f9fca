"""Solvers: the weights of one matrix for a fixed mask. One file each.

`least_squares.py` holds the problem, `base.py` the contract.

What asks for either kind is typed `Solver | GradientDescent`: a `Solver` solves by itself, `GradientDescent` is what a
training loop needs to know.
"""

from recon.solvers.admm import ADMMSolver
from recon.solvers.base import Solution, Solver
from recon.solvers.conjugate_gradients import ConjugateGradients
from recon.solvers.gradient_descent import GradientDescent
from recon.solvers.least_squares import LeastSquares, relative_objective

__all__ = [
    "ADMMSolver",
    "ConjugateGradients",
    "GradientDescent",
    "LeastSquares",
    "Solution",
    "Solver",
    "relative_objective",
]
