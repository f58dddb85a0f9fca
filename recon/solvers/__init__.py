"""Solvers: the weights of one matrix for a fixed mask. One file each.

`least_squares.py` has the problem, `base.py` the interface.

An option for either kind has the type `Solver | GradientDescent`: a `Solver` solves by itself, `GradientDescent` has
the settings of a training loop.
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
