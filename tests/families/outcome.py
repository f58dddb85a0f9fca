"""What recon makes of one causal-LM configuration: built, accepted, recovered by the real command."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModelForCausalLM

from recon.cli import main
from recon.models.anatomy import Anatomy
from recon.models.replay import Replay
from recon.models.windows import kind_of, submodule_windows
from recon.pruning.masks import Masks
from tests.families.small import small_config, small_model, small_shape

SCOPES = ("matrix", "submodule", "block")
MAX_REASON = 300  # letters
VOCABULARY = 2048  # of the bundled tokenizer
MORE = {"afmoe": ("--pruning.experts", "all")}
"""Options of families whose untrained router sends no token to some experts."""
DATA = ("num_sequences", "4"), ("seq_len", "16"), ("num_validation", "2"), ("num_test", "2"), ("batch_size", "2")


@dataclass(frozen=True)
class Outcome:
    """The outcome for one model type.

    Args:
        status: `accepted`, `refused`, or `not built` where transformers itself makes no model of it.
        text: The windows of the submodule scope; the first sentence of the reason otherwise.
        dense: Parameters of two or more dimensions in the blocks that are trained and never pruned.
    """

    status: str
    text: str
    dense: tuple[str, ...] = ()


def outcome_of(model_type: str) -> Outcome:
    """Read a small model and lay out its windows, each of whose moves is tried against the model."""
    try:
        model = small_model(small_config(model_type))
    except Exception as error:  # transformers raises anything
        return Outcome("not built", f"{type(error).__name__}: {first_line(str(error))}")
    try:
        anatomy = Anatomy.of(model)
        windows = submodule_windows(Replay(model, anatomy))
    except ValueError as error:
        return Outcome("refused", reason(str(error)))
    kinds = dict.fromkeys(kind_of(window.name) for window in windows)
    return Outcome(
        "accepted", ", ".join(kinds), tuple(sorted({name for block in anatomy.blocks for name in block.left_dense()}))
    )


def first_line(message: str) -> str:
    """The first line with text."""
    return next((line.strip()[:MAX_REASON] for line in message.splitlines() if line.strip()), "")


def reason(message: str) -> str:
    """The first sentence of a refusal, without the list and the number of what was found."""
    sentence = first_line(message).partition(": ")[0].partition(". ")[0].rstrip(".")
    return re.sub(r"\bfound \d+ ", "found ", sentence)


def recover(model_type: str, scope: str, directory: Path) -> str:
    """Prune a small model to 2:4 and recover it by `recon fit`, then count zeros in the written model.

    Returns:
        `ok`, or what went wrong.
    """
    run = directory / f"{model_type}-{scope}"
    options = [text for name, value in DATA for text in (f"--data.{name}", value)]
    options += MORE.get(model_type, ())
    if scope != "matrix":  # so few tokens tell nothing about learning rates and starts
        options += ["--model.epochs", "1", "--model.lr", "1e-3", "--model.start", "pruned"]
    shape = ["--model.name", "random", "--model.shape", json.dumps(small_shape(model_type, VOCABULARY))]
    fit = ["fit", "-c", f"scopes/{scope}", "--pattern", "2:4", "--baselines", "false", "--run_dir", str(run)]
    for command in ([*fit, *shape, *options], ["verify", str(run)]):
        try:
            status = main(command)
        except Exception as error:  # it is the outcome
            said = first_line(str(error).replace(f"{directory}/", ""))
            return f"recon {command[0]}: {type(error).__name__}: {said}"
        if status:
            return f"recon {command[0]} ended with status {status}"
    violations = violations_in(run)
    return f"{violations} pruned weights are not zero" if violations else "ok"


def violations_in(run: Path) -> int:
    """Count the pruned weights that are not zero in the written model, loaded: some families rename those in files."""
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    weights, masks = dict(model.named_parameters()), Masks.load(run / "masks.safetensors")
    return sum(int(weights[name][~keep].count_nonzero()) for name, keep in masks.items())
