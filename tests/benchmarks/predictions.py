"""What `recon plan` predicts against what the run takes: peaks of live tensors, and seconds.

The bundled model and random ones of three families, of which each has what the others have not. The plan of a row is
made just before its fit, with rates measured at that model's own block: so both meet the machine in the same state,
as far as there is one. On a machine that has other work, look at CPU seconds, of which a fit takes as many: they are
predicted from rates that are measured in CPU seconds, in one thread.
"""

import io
import json
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recon.cli.plan import main as recon_plan
from recon.models.loading import ModelSource
from recon.planner import PlanOptions
from recon.planner.flops import seconds_of
from recon.planner.speed import measured_speeds

from .fits import Data, Fit, arguments, fit, peak_bytes, say

SCOPES = ("matrix", "submodule", "block", "full")
GOAL = {"bytes": 0.10, "seconds": 0.25}

SHAPES: dict[str, dict[str, Any] | None] = {
    "bundled": None,
    "gpt2": {  # biases, layer norms, matrices laid out the other way round, tied
        "model_type": "gpt2",
        "vocab_size": 2048,
        "n_embd": 192,
        "n_layer": 4,
        "n_head": 6,
        "n_positions": 256,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "llama": {  # grouped queries, a head of its own
        "model_type": "llama",
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    },
    "qwen3": {  # heads wider than their share of the width, norms in attention
        "model_type": "qwen3",
        "vocab_size": 2048,
        "hidden_size": 192,
        "intermediate_size": 576,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    },
}
"""Name -> shape; None is the bundled model."""


@dataclass(frozen=True)
class Size(Data):
    """How much is recovered.

    Args:
        epochs: Of each window.
        full_epochs: Of the model in full retraining, which would be over before its start-up counts little.
        batch_size: Sequences per step.
    """

    num_sequences: int = 48
    num_validation: int = 8
    epochs: int = 1
    full_epochs: int = 3
    batch_size: int = 4

    def options(self, scope: str, shape: dict[str, Any] | None) -> list[str]:
        """Options of `recon fit`, and of `recon plan`."""
        model = [] if shape is None else ["--model.name", "random", f"--model.shape={json.dumps(shape)}"]
        batch = "--data.batch_size" if scope == "full" else "--model.batch_size"
        epochs = self.full_epochs if scope == "full" else self.epochs
        return [
            *(*model, "-c", "criteria/magnitude", "--trainer.accelerator", "cpu", batch, str(self.batch_size)),
            *self.data_options,
            *([] if scope == "matrix" else ["--model.epochs", str(epochs)]),
        ]


QUICK = Size(num_sequences=4, seq_len=16, num_validation=2, full_epochs=1, batch_size=2)


def measure(
    directory: Path,
    quick: bool = False,
    shapes: dict[str, dict[str, Any] | None] | None = None,
    scopes: tuple[str, ...] = SCOPES,
) -> dict[str, Any]:
    """A row per shape and scope.

    Args:
        directory: Where the runs go.
        quick: Few short sequences.
        shapes: Name -> shape, None for the bundled model; all if None.
        scopes: Which.
    """
    size = QUICK if quick else Size()
    if not quick:  # the first in a process pays for imports
        fit("matrix", directory / "first", *QUICK.options("matrix", None))
    rows = []
    for name, shape in (SHAPES if shapes is None else shapes).items():
        for scope in scopes:
            target, options = directory / f"{name}-{scope}", size.options(scope, shape)
            planned = plan(scope, target, *options)
            planned["cpu_seconds"] = cpu_seconds(planned, shape)
            row = {"shape": name, "scope": scope, **compared(planned, fit(scope, target, *options))}
            rows.append(row)
            ratios = ", ".join(f"{what} {one:.2f}" for what, one in row["ratios"].items() if one is not None)
            say(f"predictions: {name}, {scope}: {row['measured']['seconds']:.2f} s; {ratios}")
    return {"goal": GOAL, "size": vars(size), "rows": rows}


def plan(scope: str, directory: Path, *options: str) -> dict[str, Any]:
    """The row of `recon plan` for one scope, at rates that are measured now.

    Raises:
        RuntimeError: If it fails; it has said why.
    """
    asked = ["--scopes", f"[{scope}]", "--flop_rate", "measure", "--json", "true"]
    with redirect_stdout(io.StringIO()) as printed:
        code = recon_plan([*arguments(scope, directory, *options), *asked])
    if code:
        raise RuntimeError(f"recon plan failed for the {scope} scope")
    text = printed.getvalue()
    (row,) = json.loads(text[text.index("{") :])["scopes"]
    return row


def cpu_seconds(planned: dict[str, Any], shape: dict[str, Any] | None) -> float:
    """The CPU seconds that the work of a plan takes."""
    options = PlanOptions(**{**planned["setting"], "exclude": tuple(planned["setting"]["exclude"])})
    source = ModelSource() if shape is None else ModelSource("random", shape)
    rates = measured_speeds(source, options, torch.device("cpu"), clock=time.process_time)
    return seconds_of(planned["work"], rates, options)


def compared(planned: dict[str, Any], run: Fit) -> dict[str, Any]:
    """What was predicted and measured, and the ratios.

    Raises:
        AssertionError: If the run was forecast other bytes or FLOPs than `recon plan` says.
    """
    forecast = run.report["prediction"]  # of the fit, without the evaluations that a plan knows, too
    for name in ("host", "work"):
        assert planned[name] == forecast[name], f"planned {name} {planned[name]}, forecast {forecast[name]}"
    of_moment = planned["moments"][forecast["moment"]]
    assert of_moment == forecast["peak_bytes"], f"planned {of_moment}, forecast {forecast['peak_bytes']}"
    predicted = {"device_bytes": forecast["peak_bytes"], "host_bytes": planned["host_bytes"]}
    predicted |= {"seconds": planned["seconds"], "cpu_seconds": planned["cpu_seconds"]}
    measured = {**peak_bytes(run), "seconds": run.seconds, "cpu_seconds": run.cpu_seconds}
    ratios = {name: predicted[name] / measured[name] if measured[name] else None for name in predicted}
    return {
        "predicted": predicted,
        "measured": measured,
        "ratios": ratios,
        "moment": forecast["moment"],
        "categories": {"predicted": forecast["categories"], "measured": run.report["ranks"][0]["tracked"]},
        "host": planned["host"],
        "work": planned["work"],
        "rates": planned["flop_rate"],
    }


def table(result: dict[str, Any]) -> str:
    """Markdown, a line per shape and scope."""
    lines = [
        "| model | scope | device side, MiB: predicted | measured | ratio | host side, MiB: predicted | measured "
        "| ratio | seconds: predicted | measured | ratio | CPU seconds: predicted | measured | ratio |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        cells = [row["shape"], row["scope"]]
        for name, scale in (("device_bytes", 2**-20), ("host_bytes", 2**-20), ("seconds", 1), ("cpu_seconds", 1)):
            values = [row["predicted"][name] * scale, (row["measured"][name] or 0) * scale, row["ratios"][name]]
            cells += ["" if one is None else f"{one:.2f}" for one in values]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Goal: within 10 % of the peak, within 25 % of the seconds."])
