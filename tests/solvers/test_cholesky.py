"""A Cholesky factor is that of the matrix it says it is of, or there is none."""

import logging

import pytest
import torch

from recon.solvers.cholesky import Factor, cholesky, dead_columns


def with_eigenvalues(eigenvalues: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A symmetric fp64 matrix."""
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return Q @ torch.diag(eigenvalues.double()) @ Q.T


def assert_factor_of(factor: Factor, gram: torch.Tensor, damping: float) -> None:
    damped = gram.double() + damping * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    lower = factor.lower.double()
    assert factor.lower.dtype == torch.float32
    assert factor.damping == damping
    assert torch.equal(lower, lower.tril())
    assert (lower.diagonal() > 0).all()
    assert (lower @ lower.T - damped).norm() < 1e-6 * damped.norm()


@pytest.mark.parametrize("damping", [0.0, 0.01, 0.5, 3.0])
def test_the_factor_is_that_of_the_damped_matrix(damping: float, caplog: pytest.LogCaptureFixture) -> None:
    gram = with_eigenvalues(torch.linspace(1, 20, 30)).float()
    before = gram.clone()
    factor = cholesky(gram, damping, "m")
    assert_factor_of(factor, gram, damping)
    assert torch.equal(gram, before)
    assert not caplog.records


def test_what_only_fp32_calls_indefinite_keeps_its_damping(caplog: pytest.LogCaptureFixture) -> None:
    gram = with_eigenvalues(10.0 ** -torch.linspace(0, 11, 60))
    assert int(torch.linalg.cholesky_ex(gram.float()).info) != 0  # or this tests nothing
    factor = cholesky(gram, 0.0, "q_proj")
    assert_factor_of(factor, gram, 0.0)
    assert [(record.levelno, "`q_proj`" in record.message) for record in caplog.records] == [(logging.WARNING, True)]


@pytest.mark.parametrize(
    ("smallest", "damping", "used"),
    [(-0.003, 0.001, 0.01), (-0.03, 0.01, 0.1), (-0.03, 0.001, 0.1), (-0.6, 0.01, 1.0), (-0.6, 0.03, 1.0)],
)
def test_an_indefinite_matrix_gets_ever_ten_times_the_damping(
    smallest: float, damping: float, used: float, caplog: pytest.LogCaptureFixture
) -> None:
    eigenvalues = torch.ones(40)
    eigenvalues[0] = smallest
    eigenvalues /= eigenvalues.mean()
    gram = with_eigenvalues(eigenvalues).float()
    factor = cholesky(gram, damping, "q_proj")
    assert factor.damping == pytest.approx(used)
    assert_factor_of(factor, gram, factor.damping)
    assert f"`q_proj` has no Cholesky factor in fp32 with damping {damping:g}; used fp64 and damping {used:g}" in (
        caplog.text
    )


def test_zero_damping_can_be_raised() -> None:
    eigenvalues = torch.ones(40)
    eigenvalues[0] = -1e-4
    gram = with_eigenvalues(eigenvalues).float()
    factor = cholesky(gram, 0.0, "m")
    assert factor.damping == pytest.approx(1e-3)
    assert_factor_of(factor, gram, factor.damping)


def test_a_rank_deficient_gram_is_factorized() -> None:
    X = torch.randn(10, 40, generator=torch.Generator().manual_seed(0))
    gram = X.T @ X
    factor = cholesky(gram, 0.0, "m")
    assert 0 < factor.damping <= 1e-4
    assert_factor_of(factor, gram, factor.damping)
    assert cholesky(gram, 0.01, "m").damping == 0.01


def test_what_overflows_fp32_is_factorized_in_fp64(caplog: pytest.LogCaptureFixture) -> None:
    gram = with_eigenvalues(torch.linspace(1, 20, 30)) * 1e60
    factor = cholesky(gram, 0.01, "m")
    assert "used fp64 and damping 0.01" in caplog.text
    assert_factor_of(factor, gram, 0.01)


@pytest.mark.parametrize("scale", [1e-100, 1e100])
def test_a_factor_that_does_not_fit_fp32_is_an_error(scale: float) -> None:
    """Rounded to fp32 its diagonal would be 0 or infinite."""
    with pytest.raises(ValueError, match="whose factor fits fp32, got the Gram matrix of `q_proj`"):
        cholesky(scale * torch.eye(3, dtype=torch.float64), 0.01, "q_proj")


@pytest.mark.parametrize("gram", [-torch.eye(3), torch.zeros(3, 3), torch.diag(torch.tensor([1.0, 1.0, -5.0]))])
@pytest.mark.parametrize("damping", [0.0, 0.01, 2.0])
def test_no_factor_is_an_error_never_an_identity(gram: torch.Tensor, damping: float) -> None:
    with pytest.raises(ValueError, match=f"`q_proj`.* with damping {max(damping, 1.0):g}"):
        cholesky(gram, damping, "q_proj")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_is_named(value: float) -> None:
    gram = torch.eye(3)
    gram[0, 2] = value  # in the triangle that LAPACK does not read
    with pytest.raises(FloatingPointError, match="got 1 NaN or infinite of 9 in the Gram matrix of `q_proj`"):
        cholesky(gram, 0.01, "q_proj")


@pytest.mark.parametrize("damping", [-0.1, float("nan")])
def test_negative_damping_is_refused(damping: float) -> None:
    with pytest.raises(ValueError, match=r"needs to be >= 0, got .* for `q_proj`"):
        cholesky(torch.eye(2), damping, "q_proj")


def test_dead_columns() -> None:
    X = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 1.0]])
    assert dead_columns(X.T @ X).tolist() == [False, True, False]
