"""How often a whole run unpacks each of its masks."""

from collections import Counter
from pathlib import Path

import pytest
import torch

import callbacks.mask_enforcer
import recon.pruning.masks
from recon.cli import main

SMALL = {"num_sequences": 4, "seq_len": 16, "num_validation": 2, "num_test": 2, "batch_size": 2}


def test_a_run_unpacks_each_mask_a_few_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the pruned model's perplexity, for the exact start and for the gradients: once each."""
    counts: Counter[int] = Counter()
    unpack = recon.pruning.masks.unpack

    def counted(packed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        counts[packed.data_ptr()] += 1  # of bytes that live as long as the run
        return unpack(packed, shape)

    for module in (recon.pruning.masks, callbacks.mask_enforcer):
        monkeypatch.setattr(module, "unpack", counted)
    options = [f"--data.{name}={value}" for name, value in SMALL.items()]
    command = ["fit", "-c", "scopes/submodule", "--model.epochs", "1", "--summary", "false", *options]
    assert main([*command, "--run_dir", str(tmp_path)]) == 0
    assert len(counts) == 42
    assert set(counts.values()) == {3}
