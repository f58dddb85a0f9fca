"""Pictures of a comparison in TensorBoard."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recon.report import Results, draw_pareto, log_pictures
from tests.report.test_report import report


def test_pictures_are_shown_once_however_often_they_are_drawn(tmp_path: Path) -> None:
    for _ in range(2):
        drawn = draw_pareto(Results([report("block")]), tmp_path)
        log_pictures(drawn, tmp_path / "pictures")
    assert EventAccumulator(str(tmp_path / "pictures")).Reload().Tags()["images"] == ["pareto"]
    assert len(list((tmp_path / "pictures").iterdir())) == 1


def test_what_cannot_be_shown_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log_pictures([tmp_path / "missing.png"], tmp_path / "pictures")
    assert "could not show the pictures in TensorBoard" in caplog.text
