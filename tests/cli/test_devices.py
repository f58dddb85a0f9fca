"""The device that commands compute and measure on, on a machine with two GPUs."""

from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from recon.cli import main, plan
from recon.cli.arguments import choose_device


@pytest.fixture
def current() -> Iterator[mock.Mock]:
    """Receives each device that is made the current one."""
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "device_count", return_value=2),
        mock.patch.object(torch.cuda, "set_device") as chosen,
    ):
        yield chosen


def test_the_device_of_a_command_is_the_current_one(current: mock.Mock) -> None:
    assert choose_device("cuda:1") == torch.device("cuda:1")
    current.assert_called_once_with(torch.device("cuda:1"))
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("cpu") == torch.device("cpu")
    current.assert_called_once()


@pytest.mark.parametrize(
    ("options", "device"),
    [
        (["--trainer.devices", "[1]"], "cuda:1"),
        (["--trainer.devices", "[7]"], "cuda:0"),  # planned for another machine
        (["--trainer.devices", "1"], "cuda:0"),
        (["--trainer.devices", "[1]", "--trainer.accelerator", "cpu"], "cpu"),
    ],
)
def test_a_plan_measures_the_device_of_the_trainer(
    options: list[str], device: str, current: mock.Mock, capsys: pytest.CaptureFixture[str]
) -> None:
    with mock.patch.object(plan, "measured_speeds", return_value=1e9) as measured:
        assert main(["plan", "-c", "scopes/block", "--scopes", "[block]", "--flop_rate", "measure", *options]) == 0
    assert measured.call_args.args[2] == torch.device(device)
    assert [one.args[0] for one in current.call_args_list] == [torch.device(device)] * (device != "cpu")
