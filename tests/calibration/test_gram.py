"""The Gram matrix for a start: its error against fp64 as a device with TF32 would make it, and its products."""

from unittest import mock

import pytest
import torch
from torch import Tensor

from recon.calibration import gram
from recon.calibration.activations import Activations
from recon.calibration.gram import StartGram, has_16_bit_products, products
from recon.models.anatomy import Anatomy
from recon.models.replay import Replay
from tests.support import references
from tests.support.families import tiny
from tests.support.tf32 import TF32, rounded


def heavy_tailed(num: int = 600, width: int = 96) -> Tensor:
    """Inputs over five decades, a few of them with massive values, all correlated."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(num, width, generator=generator) + torch.randn(num, 1, generator=generator)
    inputs *= torch.logspace(-2, 2, width)
    inputs[::50, 7] *= 1000
    return inputs


def collected(inputs: Tensor, columns: int = 40) -> Tensor:
    with mock.patch.object(gram, "COLUMNS", columns):
        sums = StartGram(torch.zeros(inputs.shape[1], inputs.shape[1]))
        for batch in inputs.split(128):
            sums.add(batch)
        sums.finish()
    return sums.total


def relative_errors(found: Tensor, inputs: Tensor) -> Tensor:
    """Of each entry, relative to the norms of its two inputs."""
    exact = references.gram(inputs)
    norms = exact.diagonal().sqrt()
    return (found.double() - exact).abs() / norms / norms[:, None]


SUMS = 2e-6
"""Rounding of the sums in fp32."""


def test_tf32_errs_by_no_more_than_is_documented() -> None:
    inputs = heavy_tailed()
    with TF32() as mode:
        found = collected(inputs)
    assert mode.products["ieee"] == 0
    assert torch.equal(found, found.T)
    errors = relative_errors(found, inputs)
    assert 2**-14 < errors.max() <= 2**-10 + SUMS
    # It is the Gram matrix of rounded inputs: semidefinite, to the rounding of the sums.
    assert relative_errors(found, rounded(inputs)).max() < SUMS
    norms = found.double().diagonal().sqrt()
    assert torch.linalg.eigvalsh(found.double() / norms / norms[:, None]).min() > -1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_of_16_bits_are_not_rounded(dtype: torch.dtype) -> None:
    inputs = (heavy_tailed() / 100).to(dtype)
    with TF32():
        found = collected(inputs)
    assert relative_errors(found, inputs).max() < SUMS


def test_inputs_of_16_bits_are_multiplied_as_they_are_where_the_device_can() -> None:
    inputs, seen = heavy_tailed().bfloat16(), []

    def mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype) -> Tensor:
        seen.append((a.dtype, b.dtype, out_dtype))
        return a.float() @ b.float()

    assert not has_16_bit_products("cpu")
    with mock.patch.object(gram, "has_16_bit_products", return_value=True), mock.patch.object(torch, "mm", mm):
        found = collected(inputs)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16, torch.float32)}
    assert relative_errors(found, inputs).max() < SUMS


def test_matrices_with_one_input_share_its_products() -> None:
    """Query, key and value; gate and up: four Gram matrices in place of seven, and half of each."""
    model = tiny("llama")
    anatomy, tokens = Anatomy.of(model), torch.arange(4 * 24).reshape(4, 24)
    block = anatomy.blocks[0]
    matrices = {one.weight_name: one for one in block.matrices.values()}
    narrow, wide = model.config.hidden_size, model.config.intermediate_size
    walk = Activations(Replay(model, anatomy), tokens, 2, torch.device("cpu"))
    with mock.patch.object(gram, "COLUMNS", 16), TF32() as mode:
        found = walk.enter([0], matrices, "start gram")
        expected = tokens.numel() * (3 * products(narrow) + products(wide))
    assert len({one.gram.data_ptr() for one in found.values() if one.gram is not None}) == 4
    assert mode.products["tf32"] == expected < 0.8 * tokens.numel() * (3 * narrow**2 + wide**2)


def test_half_of_the_products_are_left_out() -> None:
    assert products(1000) == 1000**2
    assert products(4096) == 0.75 * 4096**2
    assert products(8 * 2048) == 36 * 2048**2
