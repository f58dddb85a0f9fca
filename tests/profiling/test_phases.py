from pathlib import Path

import pytest
import torch

from recon.profiling.phases import PhaseListener, PhaseName, Phases, is_window, window_phase

pytestmark = pytest.mark.filterwarnings("error")


class Log(PhaseListener):
    def __init__(self) -> None:
        self.events: list[str] = []

    def on_run_start(self, directory: Path, device: torch.device) -> None:
        self.events.append(f"run in {directory}")

    def on_phase_start(self, name: str) -> None:
        self.events.append(f"+{name}")

    def on_phase_end(self, name: str) -> None:
        self.events.append(f"-{name}")

    def on_run_end(self, failed: bool) -> None:
        self.events.append("failed" if failed else "end")


class Listening:
    """Listens without being told to: four methods are enough."""

    on_run_start = on_phase_start = on_phase_end = on_run_end = lambda self, *_: None


class HalfListening:
    def on_phase_start(self, name: str) -> None:
        pytest.fail("is no listener")


def test_phases_follow_each_other_and_the_last_one_ends_with_the_run() -> None:
    log, other = Log(), Log()
    phases = Phases([HalfListening(), log, object(), other])
    with phases.run(Path("here")):
        phases.enter("load")
        assert phases.current == "load"
        phases.enter("prune")
        phases.leave()
        assert phases.current is None
        phases.leave()
        phases.enter("save")
    assert log.events == ["run in here", "+load", "-load", "+prune", "-prune", "+save", "-save", "end"]
    assert other.events == log.events
    assert phases.current is None


def test_a_phase_that_fails_has_ended_and_its_run_has_failed() -> None:
    log = Log()
    phases = Phases([log])

    def run() -> None:
        with phases.run(Path("here")):
            phases.enter("load")
            raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        run()
    assert log.events == ["run in here", "+load", "-load", "failed"]


def test_who_listens_is_known_by_the_four_methods() -> None:
    listening = Listening()
    assert Phases([HalfListening(), listening, None]).listeners == [listening]


def test_without_listeners_phases_are_only_names() -> None:
    phases = Phases()
    phases.enter("load")
    assert phases.current == "load"
    phases.leave()
    assert phases.current is None


def test_names_reach_files_as_plain_text() -> None:
    log = Log()
    phases = Phases([log])
    phases.enter(PhaseName.BASELINES)
    assert type(phases.current) is str  # whose repr, in messages, is not that of an enum
    phases.enter(window_phase("000.attention"))
    phases.leave()
    assert log.events == [
        "+evaluate dense and pruned",
        "-evaluate dense and pruned",
        "+window 000.attention",
        "-window 000.attention",
    ]
    assert is_window("window 000.attention")
    assert not any(is_window(name) for name in PhaseName)
