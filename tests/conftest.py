"""Tests run with the shape annotations of recon checked, on one thread, without a network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

install_import_hook(["recon", "callbacks"], "beartype.beartype")

import torch

torch.set_num_threads(1)  # tiny models: two threads would wait for each other
