"""The prediction that a run makes of itself before its processes are connected."""

import json
from typing import Any

import lightning as L
import pytest
import torch

from recon.cli.fit import parse_only
from recon.distributed.strategies import FullyShardedStrategy, WindowParallelStrategy, ZeroStrategy
from recon.planner import PlanOptions, Shape, forecast, predict
from recon.planner.fake.tracker import FORMULAS
from recon.planner.trainer_options import configured_trainer_options, trainer_options
from recon.scopes import BlockDistillation, FullRetraining
from tests.support.scope_fixtures import IGNORED, data_of, trainer_of

pytestmark = [pytest.mark.filterwarnings(warning) for warning in IGNORED]

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def test_a_forecast_is_the_prediction_of_the_run_and_leaves_no_trace() -> None:
    data = data_of(num=8, validation=4, seq=16, batch_size=2)
    scope = BlockDistillation(name="random", shape=LLAMA, batch_size=2, offload="host", activations="host")
    trainer, before = trainer_of(), torch.get_rng_state()
    found = forecast(scope, data, trainer, exclude=("*.0.*",), masked=True)
    given: dict[str, Any] = {"exclude": ("*.0.*",), "offload": "host", "activations": "host", "device": "cpu"}
    given["searches_rate"] = given["chooses_start"] = True
    given |= {"num_test": data.num["test"], "evaluation_batch_size": 2}
    options = PlanOptions("block", 2, 16, 8, 4, **given)
    assert found == predict(Shape(scope.source), options).as_dict()
    json.dumps(found)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_forecast_says_why_there_is_none(caplog: Any) -> None:
    data = data_of()
    options: dict[str, Any] = {"exclude": (), "masked": False}
    scope = BlockDistillation(name="random", shape=LLAMA)
    assert "no pattern" in forecast(scope, data, trainer_of(), **options)["reason"]
    data.num["validation"] = None
    found = forecast(FullRetraining(name="random", shape=LLAMA), data, trainer_of(), **options)
    assert found.keys() == {"reason"}
    assert "data.num_validation, got null" in found["reason"]
    assert [record.levelname for record in of_recon(caplog)] == ["WARNING", "WARNING"]


def of_recon(caplog: Any) -> list[Any]:
    return [record for record in caplog.records if record.name.startswith("recon.")]


@pytest.mark.parametrize(
    "error", [AssertionError("heads\n  differ"), KeyError("x"), AttributeError(), MemoryError("y")]
)
def test_a_forecast_never_stops_a_run(error: Exception, monkeypatch: Any, caplog: Any) -> None:
    """Such as torch's FLOP formula of attention, which asserts on fewer key heads than query heads in some versions."""

    def refuse(*args: Any, **kwargs: Any) -> int:
        raise error

    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    monkeypatch.setitem(FORMULAS, attention, refuse)
    scope = BlockDistillation(name="random", shape=LLAMA)
    found = forecast(scope, data_of(), trainer_of(), exclude=(), masked=True)
    assert found.keys() == {"reason"}
    (record,) = of_recon(caplog)
    assert "\n" not in record.getMessage()
    assert record.getMessage().endswith(found["reason"])


def several(**options: Any) -> L.Trainer:
    """A trainer of two processes that are not connected."""
    return L.Trainer(accelerator="cpu", devices=2, logger=False, enable_checkpointing=False, **options)


STRATEGIES: dict[str, Any] = {
    "ddp": lambda: "ddp",
    "ddp_spawn": lambda: "ddp_spawn",
    "zero1": lambda: ZeroStrategy(stage=1),
    "zero3_offload": lambda: ZeroStrategy(stage=3, offload_optimizer=True, offload_parameters=True),
    "fsdp2": FullyShardedStrategy,
    "window_parallel": WindowParallelStrategy,
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_processes_are_those_of_the_trainer_before_any_is_connected(name: str) -> None:
    trainer = several(strategy=STRATEGIES[name](), num_nodes=2)
    found = trainer_options(trainer)
    assert (found["world_size"], found["num_nodes"]) == (4, 2)
    sharding = name.partition("_offload")[0]
    expected = {"ddp_spawn": "ddp", "window_parallel": "none"}.get(sharding, sharding)
    assert found["sharding"] == expected
    assert found["offload_optimizer"] == found["offload_parameters"] == name.endswith("_offload")


@pytest.mark.parametrize("name", ["ddp", "strategies/zero2", "strategies/zero3_offload", "strategies/fsdp2"])
def test_a_configured_trainer_gives_what_the_built_one_gives(name: str) -> None:
    strategy = ["-c", name] if "/" in name else ["--trainer.strategy", name]
    config = parse_only(["-c", "scopes/full", *strategy, "--trainer.accelerator", "cpu", "--trainer.devices", "2"])
    kinds = {"ZeroStrategy": ZeroStrategy, "FullyShardedStrategy": FullyShardedStrategy}
    given = config.trainer.strategy
    if not isinstance(given, str):
        given = kinds[given.class_path.rpartition(".")[2]](**given.init_args.as_dict())
    built = several(strategy=given, precision=config.trainer.precision)
    assert configured_trainer_options(config.trainer, is_local=False) == trainer_options(built)
    alone = configured_trainer_options(config.trainer, is_local=True)
    assert (alone["world_size"], alone["sharding"], alone["offload_optimizer"]) == (1, "none", False)
