"""How often a whole run unpacks each of its masks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import json, sys
from collections import Counter
import callbacks.mask_enforcer, recon.pruning.masks
from recon.cli import main

counts, unpack = Counter(), recon.pruning.masks.unpack

def counted(packed, shape):
    counts[packed.data_ptr()] += 1  # of bytes that live as long as the run
    return unpack(packed, shape)

for module in (recon.pruning.masks, callbacks.mask_enforcer):
    module.unpack = counted
assert main(sys.argv[1:]) == 0
print(json.dumps(list(counts.values())))
"""

SMALL = {"num_sequences": 4, "seq_len": 16, "num_validation": 2, "num_test": 2, "batch_size": 2}
NUM_MASKS = 6 * 7


@pytest.mark.slow
def test_a_run_unpacks_each_mask_for_the_baseline_the_two_starts_and_the_gradients(tmp_path: Path) -> None:
    """In a process of its own: in this one beartype looks into mappings, and so unpacks masks."""
    options = [f"--data.{name}={value}" for name, value in SMALL.items()]
    command = ["fit", "-c", "scopes/submodule", "--model.epochs", "1", "--model.lr", "1e-3"]
    command += ["--drift", "false", "--summary", "false"]
    process = subprocess.run(
        [sys.executable, "-c", CODE, *command, *options, "--run_dir", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(process.stdout.splitlines()[-1]) == [4] * NUM_MASKS
