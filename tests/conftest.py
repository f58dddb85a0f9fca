"""Tests run with the shape annotations of recon checked, on one thread, without a network."""

import os
from collections.abc import Iterator
from importlib.util import find_spec

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("COLUMNS", None)  # tables are as wide in pytest's workers, which have 80, as in a pipe

import pytest
import torch
from jaxtyping import install_import_hook

if find_spec("beartype"):  # a bare machine runs the GPU tests without
    install_import_hook(["recon", "callbacks"], "beartype.beartype")


def pytest_configure() -> None:
    """Tiny models run on one thread: two would wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _nothing_listens_on() -> Iterator[None]:
    """A test must not leave an account of memory open: its dispatch mode would be on in all that follow."""
    yield
    from recon.profiling import ledger as account  # after the hook above

    left = list(account._open)
    for ledger in left:
        ledger.close()
    assert not left, "a ledger was left open; close it whatever happens"
    assert torch._C._len_torch_dispatch_stack() == 0, "a dispatch mode was left on"
