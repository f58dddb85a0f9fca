"""What the worker processes of the window-parallel tests run: `recon fit` of local scopes on two small blocks."""

import io
import json
import os
import signal
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from recon.cli import main as recon
from recon.cli.fit import main as fit_main
from recon.cli.merge import main as recon_merge
from recon.cli.messages import printed_messages
from recon.pruning.masks import Masks
from tests.support.distributed_runs import main_with


class Watch(Callback):
    """Which windows were trained here."""

    def __init__(self) -> None:
        self.trained: list[str] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if (name := pl_module.window.name) not in self.trained:
            self.trained.append(name)


class Stop(Callback):
    """Sends `number` to the process of `only_rank` when a batch begins; the batches count over epochs."""

    def __init__(self, number: signal.Signals, batch: int, only_rank: int) -> None:
        self.number, self.batch, self.only_rank = number, batch, only_rank

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_rank == self.only_rank and trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), self.number)


def options(scope: str, world: int, run_dir: Path, masks: str = "masks") -> list[str]:
    """Arguments of `recon fit` for two epochs (one solve, for matrices) on the model in <the module's>/masks."""
    made = run_dir.parent / "masks"
    return [
        *("-c", f"scopes/{scope}", *([] if world == 1 else ["--trainer.strategy", "window_parallel"])),
        *("--data.num_sequences", "24", "--data.seq_len", "32", "--data.num_validation", "8", "--data.num_test", "8"),
        *([] if scope == "matrix" else ["--model.epochs", "2", "--model.lr", "1e-3"]),
        *(["--model.batch_size", "8"] if scope in ("submodule", "block") else []),
        *("--model.name", str(made / "source"), "--masks", str(made / f"{masks}.safetensors"), "--baselines", "false"),
        *("--trainer.accelerator", "cpu", "--trainer.devices", str(world)),
        *("--run_dir", str(run_dir), "--summary", "false", "--drift", "false"),
    ]


def keep_masks_of(made: Path, name: str, *begins: str) -> None:
    """Write the masks of those weights whose names contain one of `begins` to `<name>.safetensors`."""
    masks = Masks.load(made / "masks.safetensors")
    kept = masks.subset([weight for weight in masks if any(part in weight for part in begins)])
    kept.save(made / f"{name}.safetensors", Masks.read_metadata(made / "masks.safetensors"))


def fit(scope: str, world: int, run_dir: Path, masks: str = "masks", *more: str) -> list[str]:
    """Run `recon fit`; returns the windows that this process has trained."""
    watch = Watch()
    main_with(watch, [*options(scope, world, run_dir, masks), *more])
    return watch.trained


def fit_and_stop(stop: Callback, scope: str, world: int, run_dir: Path, *more: str) -> None:
    """Run `recon fit` until `stop` stops it."""
    main_with(stop, [*options(scope, world, run_dir), *more])


def command(*args: str) -> int:
    """Run recon; its exit status."""
    return recon(list(args))


def merge(run_dir: Path) -> None:
    """Run `recon merge`."""
    recon_merge([str(run_dir)])


def fit_without_masks(run_dir: Path, *more: str) -> str:
    """As `fit`, of matrices, from masks and moved weights that SparseGPT chooses; returns what was said."""
    args = options("matrix", 1, run_dir)
    where = args.index("--masks")
    args = [*args[:where], *args[where + 2 :], "-c", "criteria/sparsegpt", "--model.start", "moved", *more]
    with redirect_stdout(io.StringIO()) as said, printed_messages():
        fit_main(args)
    return said.getvalue()


def fit_random(run_dir: Path, offload: str, *more: str) -> list[str]:
    """As `fit`, of groups of matrices in two blocks of a random model; masks are chosen first."""
    shape = (
        "{model_type: llama, vocab_size: 2048, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
        "num_attention_heads: 2, num_key_value_heads: 2, max_position_embeddings: 64}"
    )
    args = options("submodule", 1, run_dir)
    where = args.index("--model.name")
    args = [*args[:where], "--model.name", "random", "--model.shape", shape, *args[where + 4 :]]
    groups = ["--model.windows.groups", '[["*.q_proj","*.k_proj","*.v_proj"],["*.o_proj"],["*.mlp.*"]]']
    watch = Watch()
    main_with(watch, [*args, *groups, "--model.offload", offload, *more])
    return watch.trained


def report(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "report.json").read_text())
