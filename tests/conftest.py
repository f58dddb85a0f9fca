"""Tests run with the shape annotations of recon checked, on one thread, without a network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from jaxtyping import install_import_hook

install_import_hook(["recon", "callbacks"], "beartype.beartype")


def pytest_configure() -> None:
    """Tiny models run on one thread: two would wait for each other."""
    torch.set_num_threads(1)
