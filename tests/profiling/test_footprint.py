"""Weights, gradients and optimizer state in bytes, against counts by hand: N parameters, of which T are trained."""

import logging
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from callbacks import MaskEnforcer, MemoryProfiler
from recon.distributed.strategies import FullyShardedStrategy, ZeroStrategy
from recon.profiling.footprint import GRADIENTS, MASTERS, PARTITION, footprint, has_state
from recon.profiling.phases import Phases
from recon.scopes import FullRetraining
from tests.support.families import tiny
from tests.support.processes import in_processes
from tests.support.scope_fixtures import data_of, prepared, save_tiny
from tests.support.slow import slow

N = sum(parameter.numel() for parameter in tiny("llama").parameters())
BLOCKS = [parameter for name, parameter in tiny("llama").named_parameters() if ".layers." in name]
T = sum(parameter.numel() for parameter in BLOCKS)
LARGEST = max(parameter.numel() for parameter in BLOCKS)
STEPS = 4 * len(BLOCKS)
"""Bytes of AdamW's step counters: an fp32 scalar for each trained tensor."""


def trained(optimizer: Any, model: nn.Module) -> None:
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()


def partly_frozen() -> tuple[nn.Module, int, int]:
    """A model whose first layer is frozen, its number of parameters and of those that learn."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    model[0].requires_grad_(False)
    return model, 5 * 7 + 7 + 7 * 3 + 3, 7 * 3 + 3


def test_a_single_process_holds_all_of_it() -> None:
    model, num, num_trained = partly_frozen()
    adam = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    assert not has_state([adam])
    before = footprint(model, [adam])
    assert (before.weights, before.gradients, before.optimizer) == (4 * num, 0, 0)
    trained(adam, model)
    assert has_state([adam])
    after = footprint(model, [adam])
    assert (after.weights, after.gradients) == (4 * num, 4 * num_trained)
    assert after.optimizer == 8 * num_trained + 4 * 2  # two moments, and a step counter each for weight and bias
    assert after.on_host == after.total == 4 * num + 12 * num_trained + 8
    assert footprint(model, [SimpleNamespace(optimizer=adam)]) == after  # wrapped


def test_an_optimizer_without_state_holds_nothing() -> None:
    model, num, num_trained = partly_frozen()
    sgd = torch.optim.SGD(model.parameters())
    trained(sgd, model)
    assert not has_state([sgd])
    held = footprint(model, [sgd])
    assert (held.weights, held.gradients, held.optimizer) == (4 * num, 4 * num_trained, 0)


def test_shared_storages_count_once_and_whole() -> None:
    flat = torch.zeros(100)
    tied = nn.Linear(4, 4, bias=False)
    tied.weight = nn.Parameter(flat[:16].view(4, 4))
    other = nn.Linear(4, 4, bias=False)
    other.weight = nn.Parameter(flat[16:32].view(4, 4))
    model = nn.Sequential(tied, other, tied)
    assert footprint(model, []).weights == 4 * 100


def test_a_master_copy_belongs_to_the_optimizer() -> None:
    model = nn.Linear(4, 4, bias=False).bfloat16()
    master = nn.Parameter(model.weight.detach().float())
    master.grad = torch.zeros_like(master)
    held = footprint(model, [torch.optim.SGD([master])])
    assert (held.weights, held.gradients, held.optimizer) == (2 * 16, 4 * 16, 4 * 16)


# --- in two processes ---------------------------------------------------------------------------------


class Names(L.Callback):
    """Which of the attributes that are read from DeepSpeed are not there."""

    def __init__(self) -> None:
        self.missing: list[str] = []

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, ZeroStrategy)
        names = GRADIENTS["stage 3"] if strategy.stage == 3 else GRADIENTS["stage 1 and 2"]
        if "offload" in strategy.strategy_name and strategy.stage < 3:
            names = (*names, *GRADIENTS["stage 1 and 2, offloaded"])
        names = (*names, MASTERS) if strategy.stage == 3 else names
        self.missing = [name for name in names if not hasattr(trainer.optimizers[0], name)]
        if strategy.stage == 3 and not all(hasattr(one, PARTITION) for one in pl_module.parameters()):
            self.missing.append(PARTITION)


def train(strategy: str, precision: str, accumulate: int, model: str) -> tuple[dict[str, int], list[str]]:
    """Train all blocks of a model in this and another process; the split that was measured, and missing names."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    zero = strategy.startswith("zero")
    made: Any = {"ddp": "ddp", "fsdp2": FullyShardedStrategy()}.get(strategy) or ZeroStrategy(
        stage=int(strategy[4]), offload_optimizer=strategy.endswith("offload"), min_partitioned=0
    )
    profiler, names = MemoryProfiler(print_table=False), Names()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=made,
        precision=precision,  # type: ignore[arg-type]
        accumulate_grad_batches=accumulate,
        max_epochs=-1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[MaskEnforcer(), profiler, *[names] * zero],
    )
    scope = prepared(FullRetraining(name=model, epochs=1), data_of(num=32))
    phases = Phases([profiler])
    phases.enter("train")
    trainer.fit(scope)
    phases.leave()
    return profiler.phases[0]["split"], names.missing


@pytest.mark.parametrize(
    ("strategy", "precision", "accumulate", "weights", "gradients", "optimizer"),
    [
        ("ddp", "32-true", 1, 4 * N, 4 * T, 8 * T),
        # The state of half the weights, and an fp32 copy of them, even beside fp32 weights. ZeRO-1 reduces in the last
        # backward pass of a step, which leaves half of the gradients, as ZeRO-2 does; before, it has all of them.
        slow("zero1", "32-true", 1, 4 * N, 4 * T / 2, 12 * T / 2),
        ("zero1", "bf16-mixed", 2, 2 * N, 2 * T, 12 * T / 2),
        slow("zero2", "bf16-mixed", 2, 2 * N, 4 * T / 2, 12 * T / 2),
        # Gradients are summed up in fp32 and then copied to those of the weights that step.
        ("zero2_offload", "32-true", 2, 4 * N, (4 + 4) * T / 2, 12 * T / 2),
        slow("zero2_offload", "bf16-mixed", 2, 2 * N, (4 + 4) * T / 2, 12 * T / 2),
        slow("zero3", "32-true", 2, 4 * N / 2, 4 * T / 2, 12 * T / 2),
        ("zero3", "bf16-mixed", 2, 2 * N / 2, 4 * T / 2, 12 * T / 2),
        slow("zero3_offload", "bf16-mixed", 2, 2 * N / 2, (4 + 4) * T / 2, 12 * T / 2),
        ("fsdp2", "bf16-mixed", 1, 4 * N / 2, 4 * T / 2, 8 * T / 2),
    ],
)
def test_what_a_strategy_partitions_is_halved(
    strategy: str,
    precision: str,
    accumulate: int,
    weights: float,
    gradients: float,
    optimizer: float,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    model = save_tiny("llama", tmp_path_factory.getbasetemp())
    for split, missing in in_processes(train, strategy, precision, accumulate, model):
        assert missing == []
        assert split["weights_bytes"] == weights
        # ZeRO-1 and -2 keep the gradient whole that lies across the border between two ranks' parts.
        across = 4 * LARGEST if strategy.startswith(("zero1", "zero2")) else 0
        assert gradients <= split["gradients_bytes"] <= gradients + across
        assert optimizer < split["optimizer_bytes"] <= optimizer + STEPS
        assert split["on_host_bytes"] == sum(split[f"{part}_bytes"] for part in ("weights", "gradients", "optimizer"))
