"""Exit statuses, and the messages of jsonargparse in plain words."""

import signal
import subprocess
import sys

import pytest

from recon.basics.refusals import UsageError
from recon.cli import main
from recon.cli.errors import closest, plain, usage

UNION = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'recon.scopes.base.Scope'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'recon.scopes.BlockDistillation':
        {inner}
    - Expected a <class 'NoneType'>
  Given value type: <class 'jsonargparse._util.NestedArg'>
  Given value: NestedArg(key='lr', val='abc')"""


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (UNION.format(inner="Option 'lrr' is not accepted"), "there is no option --model.lrr"),
        (UNION.format(inner="unrecognized arguments: --lora.rnk=3"), "there is no option --model.lora.rnk"),
        (
            UNION.format(inner="Parser key \"lr\":\n Expected a <class 'float'>. Got value: abc"),
            "--model.lr needs a number, got abc",
        ),
        (UNION.format(inner="the following arguments are required: paths"), "--model needs --model.paths"),
        (UNION.format(inner="No module named 'my'"), "--model: No module named 'my'"),
        (
            "Parser key \"baselines\":\n  Expected a <class 'bool'>. Got value: maybe",
            "--baselines needs true or false, got maybe",
        ),
        (UNION.partition("\n")[2].format(inner="epochs must be at least 1"), "epochs must be at least 1"),
        ("a message of recon", "a message of recon"),
    ],
)
def test_messages_are_one_line_without_unions(message, said):
    assert plain(message) == said


def test_the_closest_words():
    assert closest("sparsegtp", ["Wanda", "SparseGPT"]) == ["SparseGPT"]
    assert closest("files", ["TextFiles", "HubDataset"]) == ["TextFiles"]
    assert closest("xyz", ["TextFiles", "HubDataset"]) == []


def test_what_goes_wrong_in_parsing_is_an_error_of_usage():
    with pytest.raises(UsageError, match="no such thing"), usage():
        raise ValueError("no such thing")
    with pytest.raises(RuntimeError), usage():
        raise RuntimeError("ours")


REPLACED = """
import sys, types
module = types.ModuleType("recon.cli.merge")
def main(args):
    {body}
module.main = main
sys.modules["recon.cli.merge"] = module
from recon.cli import main
sys.argv = ["recon", "merge", "x"]
sys.exit(main())
"""


@pytest.fixture
def answers_ctrl_c():
    """Children do not inherit that Ctrl-C is ignored, as in a job in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("answers_ctrl_c")
@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("raise ValueError('it failed')", 1, "recon merge: error: it failed"),
        ("raise OSError(28, 'No space left on device')", 1, "No space left"),
        ("from recon.basics.refusals import UsageError; raise UsageError('what?')", 2, "recon merge: error: what?"),
        ("raise KeyboardInterrupt", 130, "recon merge: stopped by Ctrl-C"),
        ("import signal, os, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", 130, "stopped by Ctrl-C"),
    ],
)
def test_exit_statuses(body, status, said):
    script = REPLACED.format(body=body)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == status
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_lightnings_answer_to_ctrl_c_is_ours(monkeypatch, capsys):
    def interrupted(args):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    monkeypatch.setattr("recon.cli.fit.main", interrupted)
    assert main(["fit", "-c", "scopes/matrix"]) == 130
    error = capsys.readouterr().err
    assert error == "recon fit: stopped by Ctrl-C; the same command goes on from what it has written\n"


@pytest.mark.usefixtures("answers_ctrl_c")
def test_ctrl_c_in_a_run(tmp_path):
    command = [sys.executable, "-m", "recon", "fit", "-c", "scopes/submodule", "--run_dir", str(tmp_path / "run")]
    command += ["--model.epochs", "500", "--model.lr", "0.01", "--data.num_sequences", "8", "--data.seq_len", "32"]
    command += ["--baselines", "false", "--data.num_test", "4", "--no_drift"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("window"):
            break
    process.send_signal(signal.SIGINT)
    shown, error = process.communicate(timeout=120)
    assert process.returncode == 130
    last = f"stopped; what was done is in {tmp_path / 'run'}, the same command goes on from there"
    assert shown.splitlines()[-1] == last
    assert error == ""


@pytest.mark.usefixtures("answers_ctrl_c")
def test_ctrl_c_again_ends_the_process():
    script = (
        "import os, signal, time; from recon.cli.interrupt import Interrupt; Interrupt().install()\n"
        "signal.signal(signal.SIGTERM, lambda *args: print('once', flush=True))\n"
        "os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT); time.sleep(9); print('too late')"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (130, "once\n")
