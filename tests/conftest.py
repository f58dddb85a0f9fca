"""Tests run with the shape annotations of recon checked, on one thread, without a network."""

import gc
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("COLUMNS", None)  # tables are as wide in pytest's workers, which have 80, as in a pipe

import pytest
import torch
from jaxtyping import install_import_hook

ROOT = Path(__file__).parents[1]
# Pyright checks all other annotations; to check them here as well would double the time of a test.
SHAPED = [
    ".".join(one.relative_to(ROOT).with_suffix("").parts)
    for package in ("recon", "callbacks")
    for one in (ROOT / package).rglob("*.py")
    if "from jaxtyping import" in one.read_text()
]

if find_spec("beartype"):  # a bare machine runs the GPU tests without
    install_import_hook(SHAPED, "beartype.beartype")


def pytest_configure() -> None:
    """Tiny models run on one thread: two would wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def small_heap() -> Iterator[None]:
    """Hide from `gc` the many objects that pytest and the libraries hold: they are slow to look through."""
    gc.freeze()
    yield
    gc.unfreeze()


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
