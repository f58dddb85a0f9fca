"""Loggers: where they write, how a run has none, and that hyperparameters reach each of them with the results."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from recon.cli import main
from recon.experiment.hyperparameters import log_hyperparameters
from recon.report import Report
from recon.scopes import FullRetraining, MatrixReconstruction
from tests.support.scope_fixtures import trainer_of
from tests.support.shapes import TIED_LLAMA, random_model
from tests.support.slow import slow

SMALL = [
    *("--data.num_sequences=8", "--data.seq_len=32", "--data.num_validation=4", "--data.num_test=8"),
    *random_model(TIED_LLAMA),
    *("--summary=false", "--drift=false"),
]
METRICS = ("perplexity", "recovered", "device_gib", "peak_gib", "seconds")


def fit(scope: str, run_dir: Path, *more: str) -> dict[str, Any]:
    assert main(["fit", "-c", f"scopes/{scope}", "--run_dir", str(run_dir), *SMALL, *more]) == 0
    return json.loads((run_dir / "report.json").read_text())


def hparams_of(directory: Path) -> tuple[dict[str, Any], EventAccumulator]:
    """What TensorBoard's HParams tab reads of a run."""
    events = EventAccumulator(str(directory)).Reload()
    content = events.PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info.hparams
    assert "_hparams_/experiment" in content
    assert "_hparams_/session_end_info" in content
    return {name: value.number_value or value.string_value for name, value in start.items()}, events


@pytest.mark.parametrize("scope", ["submodule", "full", "matrix"])
def test_tensorboard_has_them_by_default(scope: str, tmp_path: Path) -> None:
    epochs = [] if scope == "matrix" else ["--model.epochs=1"]
    report = fit(scope, tmp_path / "run", "--seed_everything=3", *epochs)
    found, events = hparams_of(tmp_path / "run" / "logs")
    expected = {"scope": scope, "criterion": "wanda", "pattern": "60% per row", "seed": 3, "epochs": 1}
    assert expected.items() <= found.items()
    assert found.get("lr") == {"submodule": "auto", "full": 0.25 / TIED_LLAMA["hidden_size"], "matrix": None}[scope]
    assert [found.get(f"lr_{kind}") for kind in report["rates"]] == [rate["lr"] for rate in report["rates"].values()]
    assert list(report["rates"]) == (["attention", "mlp"] if scope == "submodule" else [])
    logged = {name: events.Scalars(name)[-1].value for name in METRICS}
    assert logged["perplexity"] == pytest.approx(report["perplexity"], rel=1e-6)
    assert logged["recovered"] == pytest.approx(report["recovered"], rel=1e-5)
    assert logged["seconds"] == pytest.approx(report["seconds"], rel=1e-6)
    assert logged["peak_gib"] * 2**30 == pytest.approx(report["peak_host_bytes"], rel=1e-6)
    tracked = [sum(rank["tracked"]["device"].values()) for rank in report["ranks"]]
    assert logged["device_gib"] * 2**30 == pytest.approx(max(tracked), rel=1e-6)
    assert "hp_metric" not in events.Tags()["scalars"]
    seen = [(0, report["pruned_perplexity"]), (report["train_tokens"], report["perplexity"])]
    assert by_tokens(events, "perplexity") == [(step, pytest.approx(value, rel=1e-6)) for step, value in seen]
    for window, errors in report["windows"].items():
        (first, before), (last, after) = by_tokens(events, f"held_out_error/{window}")
        assert (before, after) == (pytest.approx(errors["before"]), pytest.approx(errors["after"]))
        assert (first, last) == (0, report["train_tokens"])  # each window sees all of them


def by_tokens(events: EventAccumulator, name: str) -> list[tuple[int, float]]:
    return [(one.step, one.value) for one in events.Scalars(f"by_tokens/{name}")]


def test_csv(tmp_path: Path) -> None:
    report = fit("full", tmp_path / "run", "-c", "loggers/csv", "--model.epochs=1")
    logs = tmp_path / "run" / "logs" / "version_0"
    assert yaml.safe_load((logs / "hparams.yaml").read_text())["criterion"] == "wanda"
    with (logs / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["perplexity"]) == report["perplexity"]
    assert any(row["held_out_loss"] for row in rows)


@pytest.mark.parametrize("how", [["--trainer.logger=false"], slow(["-c", "loggers/none"])])
def test_none_means_none(how: list[str], tmp_path: Path) -> None:
    fit("matrix", tmp_path / "run", *how)
    assert not (tmp_path / "run" / "logs").exists()
    assert not list((tmp_path / "run").rglob("events.out*"))


def test_true_is_the_default(tmp_path: Path) -> None:
    fit("matrix", tmp_path / "run", "--trainer.logger=true")
    assert hparams_of(tmp_path / "run" / "logs")[0]["scope"] == "matrix"


def test_several_loggers_and_an_absolute_directory(tmp_path: Path) -> None:
    loggers = [
        {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path / "elsewhere")}},
        {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "curves"}},
    ]
    fit("matrix", tmp_path / "run", f"--trainer.logger={json.dumps(loggers)}")
    assert list((tmp_path / "elsewhere").rglob("metrics.csv"))
    assert list((tmp_path / "run" / "curves").rglob("events.out*"))
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]["logger"]
    assert saved[1]["init_args"]["save_dir"] == "curves"  # as given, so that another run directory can take it


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("mlflow", "mlflow")])
def test_a_package_that_is_not_installed_gets_one_line(
    name: str, package: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        __import__(package)
    except ImportError:
        pass
    else:
        pytest.skip(f"{package} is installed")
    assert (
        main(["fit", "-c", "scopes/matrix", "-c", f"loggers/{name}", "--run_dir", str(tmp_path / "run"), *SMALL]) == 2
    )
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert f"needs the package {package}, which is not installed; install it (pip install {package})" in error[0]


class Plain(Logger):
    """A logger that takes no metrics with hyperparameters, as those of W&B and MLflow do."""

    name, version = "plain", "0"

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Any] = []

    def log_hyperparams(self, params: dict[str, Any]) -> None:  # type: ignore[override]
        self.told.append(params)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        self.told.append((metrics, step))


def log(logger: Logger, report: Report, autolog: bool = True) -> None:
    trainer = trainer_of(logger=logger, enable_autolog_hparams=autolog)
    log_hyperparameters(trainer, FullRetraining(lr=0.5, epochs=2), report)


REPORT = Report(scope="full", model="m", criterion="c", pattern="p", seed=1, perplexity=3.0, seconds=2.0)


def test_a_logger_without_metrics_gets_them_afterwards() -> None:
    plain = Plain()
    log(plain, REPORT)
    params, (metrics, step) = plain.told
    assert params == {
        "scope": "full", "label": "full", "model": "m", "criterion": "c", "pattern": "p", "seed": 1, "epochs": 2,
        "lr": 0.5,
    }  # fmt: skip
    assert (metrics, step) == ({"perplexity": 3.0, "seconds": 2.0}, 0)  # what was not measured is left out


def test_not_if_lightning_is_told_not_to() -> None:
    plain = Plain()
    log(plain, REPORT, autolog=False)
    assert plain.told == []


def test_a_scope_without_a_learning_rate(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="one")
    log_hyperparameters(trainer_of(logger=logger), MatrixReconstruction(), REPORT)
    assert "lr" not in yaml.safe_load((tmp_path / "one" / "hparams.yaml").read_text())
