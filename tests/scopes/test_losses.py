"""Every loss against its formula, written out in fp64."""

import math

import pytest
import torch

from recon.scopes.losses import cross_entropy, distillation, next_token_logits, window_loss

GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


@pytest.mark.parametrize("loss", ["normalised", "mse", "cosine"])
def test_a_window_loss_is_its_formula_and_zero_at_the_target(loss: str) -> None:
    output, target = normal(2, 3, 5), normal(2, 3, 5)
    pairs = [
        list(zip(o.double().tolist(), t.double().tolist(), strict=True))
        for o, t in zip(output.flatten(0, 1), target.flatten(0, 1), strict=True)
    ]
    squares = sum((o - t) ** 2 for pair in pairs for o, t in pair)
    cosines = [
        sum(o * t for o, t in pair) / math.sqrt(sum(o * o for o, _ in pair) * sum(t * t for _, t in pair))
        for pair in pairs
    ]
    energy = sum(t * t for pair in pairs for _, t in pair)
    expected = {"normalised": squares / energy, "mse": squares / 30, "cosine": 1 - sum(cosines) / 6}[loss]
    assert window_loss(output, target, loss).item() == pytest.approx(expected, rel=1e-5)
    assert window_loss(target, target, loss).item() == pytest.approx(0, abs=1e-6)


def test_the_normalised_loss_does_not_depend_on_the_scale() -> None:
    output, target = normal(2, 3, 5), normal(2, 3, 5)
    one, other = (window_loss(scale * output, scale * target, "normalised").item() for scale in (1.0, 8.0))
    assert one == pytest.approx(other, rel=1e-6)


def test_cross_entropy_is_that_of_the_next_token() -> None:
    logits, tokens = normal(2, 4, 7), torch.randint(7, (2, 4), generator=GENERATOR)
    expected = 0.0
    for row, sequence in zip(logits.double(), tokens.tolist(), strict=True):
        for position in range(3):
            expected -= math.log(row[position].softmax(-1)[sequence[position + 1]].item()) / 6
    assert cross_entropy(next_token_logits(logits), tokens).item() == pytest.approx(expected, rel=1e-5)
    assert next_token_logits(logits.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_is_the_divergence_of_softened_distributions(temperature: float) -> None:
    student, teacher = normal(6, 7), normal(6, 7)
    p, q = ((one.double() / temperature).softmax(-1) for one in (student, teacher))
    expected = temperature**2 * (q * (q / p).log()).sum(-1).mean().item()
    assert distillation(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-5)
    assert distillation(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-6)


def test_the_squared_temperature_keeps_gradients_at_one_size() -> None:
    teacher = 1e-3 * normal(6, 7)
    norms = []
    for temperature in (1.0, 4.0):
        student = torch.zeros(6, 7, requires_grad=True)
        distillation(student, teacher, temperature).backward()
        assert student.grad is not None
        norms.append(student.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)
