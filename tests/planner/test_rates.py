"""FLOPs line by line: their precision, their rate and their time."""

import json
from typing import Any

import pytest
import torch

from recon.calibration import gram
from recon.cli import main
from recon.cli.configs import config_directory, load_config
from recon.models.loading import ModelSource
from recon.planner import PlanOptions, Shape, predict
from recon.planner.flops import PREPARATION
from recon.planner.rates import as_rates, precisions
from recon.planner.snapshot import SOLVER_ITERATIONS, START_ITERATIONS, START_RESIDUALS
from tests.support.scope_fixtures import IGNORED
from tests.support.shapes import PLANNED

pytestmark = [pytest.mark.filterwarnings(warning) for warning in IGNORED]

H100 = as_rates(load_config(str(config_directory() / "devices/h100.yaml"))["rates"])
D, H = 64, 160
LLAMA = {**PLANNED, "num_hidden_layers": 1}


def test_the_parts_of_a_start_by_hand() -> None:
    shape = Shape(ModelSource("random", LLAMA))
    start = predict(shape, PlanOptions("submodule", 2, 16, 8, 4))
    exact = predict(shape, PlanOptions("matrix", 2, 16, 8, 4, start="pruned"))
    products = 2 * (4 * D**3 + 2 * H * D**2 + D * H**2)  # of all rows with the Gram matrices
    work = start.flops_by_kind
    assert work["gram"] == 2 * 8 * 16 * (3 * gram.products(D) + gram.products(H))
    assert (work["solve"], work["start"]) == (START_RESIDUALS * products, START_ITERATIONS * products)
    assert exact.flops_by_kind["solve"] == SOLVER_ITERATIONS * products
    assert exact.flops_by_kind["start"] == 0


def test_precisions_are_those_of_the_products() -> None:
    fp32 = precisions(PlanOptions("submodule"), torch.float32)
    assert (fp32["walk"], fp32["gram"], fp32["solve"], fp32["start"]) == ("fp32", "tf32", "fp32", "tf32")
    assert fp32["training"] == fp32["held out"] == "fp32"
    half = precisions(PlanOptions("submodule", precision="bf16-mixed"), torch.bfloat16)
    assert half["walk"] == half["gram"] == half["training"] == "bf16"
    assert half["solve"] == "fp32"
    matrix = precisions(PlanOptions("matrix", precision="bf16-mixed"), torch.bfloat16)
    assert matrix["gram"] == matrix["solve"] == "fp32"
    assert matrix["held out"] == "bf16"
    assert precisions(PlanOptions("full", precision="bf16-mixed"), torch.float32)["rest"] == "bf16"


def test_time_is_that_of_the_rates() -> None:
    shape = Shape(ModelSource("random", LLAMA))
    found = predict(shape, PlanOptions("submodule", 2, 16, 8, 4), rates=H100)
    rates = {kind: H100[found.precisions[kind]] for kind in found.flops_by_kind}
    times = {kind: flops / rates[kind] for kind, flops in found.flops_by_kind.items()}
    assert found.seconds == pytest.approx(sum(times.values()))
    assert found.seconds_of("gram") == pytest.approx(times["gram"])
    assert found.preparation == pytest.approx(sum(times[kind] for kind in PREPARATION) / times["training"])
    assert predict(shape, PlanOptions("submodule", 2, 16, 8, 4)).preparation is None


def plan(*args: str) -> list[str]:
    return ["plan", "-c", "models/llama-2-7b", "-c", "scopes/submodule", "--scopes", "[submodule]", *args]


def test_preparation_is_at_most_a_third_of_training(capsys: Any) -> None:
    assert main(plan("--data.seq_len", "2048")) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = [line[1:-1] for line in lines if line[:1] == ["submodule"] and line[-1] in ("s", "min")]
    assert [line[0] for line in shown[1:]] == ["walk", "gram", "solve", "start", "training", "held"]
    (said,) = [line for line in lines if line[:1] == ["submodule:"]]
    assert " ".join(said[1:6]) == "walk, gram, solve and start"
    assert 0 < float(said[7]) <= 1 / 3


def test_a_run_takes_at_most_two_and_a_half_times_its_floor(capsys: Any) -> None:
    half = ["--model.dtype", "bfloat16", "--trainer.precision", "bf16-mixed", "--model.epochs", "1"]
    assert main(plan("--data.seq_len", "2048", *half, "--json", "true")) == 0
    out = capsys.readouterr().out
    (row,) = json.loads(out[out.index("{") :])["scopes"]
    times = {kind: flops / row["flop_rate"][kind] for kind, flops in row["work"].items()}
    floor = (row["work"]["walk"] + row["work"]["training"]) / H100["bf16"]
    assert row["seconds"] == pytest.approx(sum(times.values()))
    assert floor < row["seconds"] <= 2.5 * floor
    assert times["gram"] + times["solve"] + times["start"] < 0.6 * times["training"]


def test_rates_give_way_to_a_flop_rate_and_are_none_of_a_cpu(capsys: Any) -> None:
    small = ["--model.shape", json.dumps(LLAMA), "--data.seq_len", "16", "--json", "true"]

    def row(*args: str) -> dict[str, Any]:
        assert main(plan(*small, *args)) == 0
        out = capsys.readouterr().out
        return json.loads(out[out.index("{") :])["scopes"][0]

    found = row("--flop_rate", "1e9")
    assert found["flop_rate"] == 1e9
    assert found["seconds"] == pytest.approx(found["flops"] / 1e9)
    assert row("--trainer.accelerator", "cpu")["seconds"] is None
    own = row("--rates", '{"bf16": 3e9, "tf32": 2e9, "fp32": 1e9}')["flop_rate"]
    assert (own["training"], own["gram"]) == (1e9, 2e9)


@pytest.mark.parametrize("rates", [{"bf16": 1.0}, {"bf16": 1.0, "tf32": 1.0, "fp32": 0.0}])
def test_rates_are_those_of_all_precisions(rates: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"for bf16, tf32, fp32, got .*; begin with configs/devices/h100\.yaml"):
        as_rates(rates)
