"""A local fit against the same arithmetic in a bare PyTorch loop, on the bundled model.

The loop is what one would write for this one model by hand: no Lightning, no callbacks, no replay, nothing written.
Criterion, statistics, exact solver and the order of the batches are recon's own. It has to end at the same weights,
bit for bit, or the comparison is refused: then both have computed the same.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from recon.basics.seeds import derived_seed
from recon.calibration.collection import collect
from recon.calibration.statistics import InputStatistics
from recon.data import TokenData
from recon.models.loading import ModelSource
from recon.pruning.masks import Masks
from recon.scopes.exact import solve

from .fits import Data, fit, say

Weights = dict[str, Tensor]

SCOPES = ("matrix", "submodule", "block")
BATCH_SIZE, LR, BETAS, WARMUP = 4, 1.2e-2, (0.9, 0.95), 0.1  # as configs/scopes and the scopes' defaults have them


@dataclass(frozen=True)
class Size(Data):
    """How much is recovered.

    Args:
        epochs: Of each window.
        repeats: Of fit and loop, in turn.
    """

    epochs: int = 2
    repeats: int = 3


QUICK = Size(num_sequences=20, seq_len=32, num_validation=8, epochs=2, repeats=1)


def measure(directory: Path, quick: bool = False, scopes: tuple[str, ...] = SCOPES) -> dict[str, Any]:
    """Seconds of fits and loops in turn, medians and their ratio, per scope.

    Raises:
        AssertionError: If fit and loop end at different weights.
    """
    size = QUICK if quick else Size()
    fit("matrix", directory / "masks", *QUICK.data_options)  # the first one in a process pays for imports
    rows = []
    for scope in scopes:
        epochs = [] if scope == "matrix" else ["--model.epochs", str(size.epochs)]
        epochs += ["--model.batch_size", str(BATCH_SIZE)]
        epochs += [] if scope == "matrix" else ["--model.lr", str(LR), "--model.start", "exact"]
        row: dict[str, Any] = {"scope": scope, "fit": [], "loop": [], "fit_cpu": [], "loop_cpu": []}
        for repeat in range(size.repeats):
            run = fit(
                scope, directory / f"{scope}-{repeat}", *size.data_options, *epochs, "--trainer.accelerator", "cpu"
            )
            loop = BareLoop.prepared(size, Masks.load(run.directory / "masks.safetensors"))
            started, started_cpu = time.perf_counter(), time.process_time()
            weights = loop.run(scope)
            row["loop"].append(time.perf_counter() - started)
            row["loop_cpu"].append(time.process_time() - started_cpu)
            row["fit"].append(run.seconds)
            row["fit_cpu"].append(run.cpu_seconds)
            row["loop_parts"] = loop.seconds
            written = load_file(run.directory / "model" / "model.safetensors")
            differing = [name for name, weight in weights.items() if not torch.equal(weight, written[name])]
            assert not differing, f"fit and loop end at different weights, {differing[0]} the first"
            say(f"bare_loop: {scope}, fit {row['fit'][-1]:.2f} s, loop {row['loop'][-1]:.2f} s")
        row["ratio"] = statistics.median(row["fit"]) / statistics.median(row["loop"])
        row["cpu_ratio"] = statistics.median(row["fit_cpu"]) / statistics.median(row["loop_cpu"])
        rows.append(row)
    return {"goal": 1.15, "size": vars(size), "same_weights": True, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """Markdown, a line per scope."""
    lines = ["| scope | fit, s | bare loop, s | ratio of medians | of CPU seconds |", "|---|--:|--:|--:|--:|"]
    for row in result["rows"]:
        fits, loops = (" ".join(f"{one:.2f}" for one in row[name]) for name in ("fit", "loop"))
        lines.append(f"| {row['scope']} | {fits} | {loops} | {row['ratio']:.3f} | {row['cpu_ratio']:.3f} |")
    return "\n".join([*lines, "", f"Goal: {result['goal']}. Fit and loop end at the same weights, bit for bit."])


class BareLoop:
    """Recovers a Llama window by window, as the local scopes do with dense inputs and targets.

    Args:
        model: In evaluation mode, dense.
        masks: Which weights survive.
        data: Calibration tokens, which pruning has made, and held-out ones, which are made now as in a fit.
        epochs: Of each window.

    Attributes:
        seconds: Spent on tokens, walking (with Gram matrices), solving and training.
    """

    def __init__(self, model: Any, masks: Masks, data: TokenData, epochs: int) -> None:
        self.model, self.masks, self.data, self.epochs = model, masks, data, epochs
        self.seconds = {"tokens": 0.0, "walk": 0.0, "solve": 0.0, "train": 0.0}

    @classmethod
    def prepared(cls, size: Size, masks: Masks) -> "BareLoop":
        """The bundled model and the calibration data of `size`."""
        data = TokenData(
            num_sequences=size.num_sequences, seq_len=size.seq_len, num_validation=size.num_validation, num_test=1
        )
        model, data.tokenizer = ModelSource().load()
        data.tokens("train")
        return cls(model, masks, data, size.epochs)

    def run(self, scope: str) -> Weights:
        """Recover all windows; the weights of the blocks."""
        model = self.model.model
        self.model.requires_grad_(False)
        with self._timed("tokens"):
            tokens = self.data.tokens("train"), self.data.tokens("validation")
        with torch.no_grad():
            hidden, held_out = (model.embed_tokens(one) for one in tokens)
            positions = model.rotary_emb(hidden[:BATCH_SIZE], torch.arange(hidden.shape[1])[None])
        for index, block in enumerate(model.layers):
            with self._timed("walk"):
                linear = {name: one for name, one in block.named_modules() if isinstance(one, nn.Linear)}
                with collect(linear, "gram") as inputs:
                    train = self._pass(block, hidden, positions)
                held = self._pass(block, held_out, positions)
            with self._timed("solve"):
                prefix = f"model.layers.{index}."
                starts = self._solve(linear, inputs, prefix)
            if scope == "submodule":
                self._submodules(index, block, starts, positions, (hidden, train), (held_out, held))
            else:
                self._block(index, block, starts, positions, (hidden, train), (held_out, held), scope == "block")
            hidden, held_out = train[0], held[0]
        return {name: one for name, one in self.model.named_parameters() if ".layers." in name}

    def _submodules(self, index: int, block: Any, starts: Weights, positions: Any, train: Any, held: Any) -> None:
        prefix = f"model.layers.{index}."
        (hidden, (output, attention)), (held_hidden, (held_output, held_attention)) = train, held

        def attend(batch: Weights) -> Tensor:
            return block.self_attn(block.input_layernorm(batch["hidden"]), positions, None)[0]

        def transform(batch: Weights) -> Tensor:
            middle = batch["hidden"] + batch["attention"]
            return middle + block.mlp(block.post_attention_layernorm(middle))

        self._begin(block, starts, prefix, "self_attn")
        parameters = [*block.self_attn.parameters(), *block.input_layernorm.parameters()]
        data = {"hidden": hidden, "target": attention}, {"hidden": held_hidden, "target": held_attention}
        self._train(2 * index, parameters, attend, data)
        self._begin(block, starts, prefix, "mlp")
        parameters = [*block.mlp.parameters(), *block.post_attention_layernorm.parameters()]
        data = (
            {"hidden": hidden, "attention": attention, "target": output},
            {"hidden": held_hidden, "attention": held_attention, "target": held_output},
        )
        self._train(2 * index + 1, parameters, transform, data)

    def _block(
        self, index: int, block: Any, starts: Weights, positions: Any, train: Any, held: Any, trains: bool
    ) -> None:
        def run(batch: Weights) -> Tensor:
            return block(batch["hidden"], position_embeddings=positions)

        data = tuple({"hidden": hidden, "target": output} for hidden, (output, _) in (train, held))
        prefix = f"model.layers.{index}."
        if trains:
            self._begin(block, starts, prefix)
            self._train(index, list(block.parameters()), run, data)
            return
        with self._timed("train"):  # of matrices, which are solved already, the errors before and after
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear):
                    module.weight.masked_fill_(~self.masks[f"{prefix}{name}.weight"], 0)
            held_out_error(run, data[1])
            self._begin(block, starts, prefix)
            held_out_error(run, data[1])

    @torch.no_grad()
    def _pass(self, block: Any, hidden: Tensor, positions: Any) -> tuple[Tensor, Tensor]:
        """What the dense block returns, and its attention."""
        output, attention = torch.empty_like(hidden), torch.empty_like(hidden)
        found: list[Tensor] = []
        handle = block.self_attn.register_forward_hook(lambda module, args, output: found.append(output[0]))
        for start in range(0, len(hidden), BATCH_SIZE):
            rows = slice(start, start + BATCH_SIZE)
            output[rows] = block(hidden[rows], position_embeddings=positions)
            attention[rows] = found.pop()
        handle.remove()
        return output, attention

    @torch.no_grad()
    def _solve(self, linear: dict[str, nn.Module], inputs: dict[str, InputStatistics], prefix: str) -> Weights:
        starts = {}
        for name, module in linear.items():
            keep = self.masks[f"{prefix}{name}.weight"]
            dense = module.get_parameter("weight").detach()
            starts[name] = solve(module, dense, inputs[name], keep, name).weight
        return starts

    @torch.no_grad()
    def _begin(self, block: nn.Module, starts: Weights, prefix: str, within: str = "") -> None:
        for name, weight in starts.items():
            if name.startswith(within):
                block.get_submodule(name).get_parameter("weight").copy_(weight)

    def _train(
        self,
        window: int,
        parameters: list[nn.Parameter],
        forward: Callable[[Weights], Tensor],
        data: tuple[Weights, Weights],
    ) -> list[Tensor]:
        """Forward, loss, backward, masked gradient, step; the held-out errors before and after each epoch."""
        with self._timed("train"):
            train, held = data
            names = {id(one): name for name, one in self.model.named_parameters()}
            keeps = [self.masks.get(names[id(one)]) for one in parameters]
            optimizer = torch.optim.AdamW(parameters, lr=LR, betas=BETAS, weight_decay=0.0)
            steps_per_epoch = -(-len(train["hidden"]) // BATCH_SIZE)
            steps, step = self.epochs * steps_per_epoch, 0
            rising = max(1, round(WARMUP * steps))
            for one in parameters:
                one.requires_grad_(True)
            errors = [held_out_error(forward, held)]
            for epoch in range(1, self.epochs + 1):
                for batch in batches(train, derived_seed(0, window, epoch)):
                    factor = min((step + 1) / rising, max(0.0, (steps - step) / max(1, steps - rising)))
                    optimizer.param_groups[0]["lr"] = LR * factor
                    output, target = forward(batch), batch["target"]
                    loss = (output - target).square().sum() / target.square().sum()
                    optimizer.zero_grad()
                    loss.backward()
                    for one, keep in zip(parameters, keeps, strict=True):
                        if keep is not None:
                            assert one.grad is not None
                            one.grad = torch.where(keep, one.grad, 0)
                    optimizer.step()
                    step += 1
                errors.append(held_out_error(forward, held))
            for one in parameters:
                one.requires_grad_(False)
                one.grad = None
            return errors

    def _timed(self, part: str) -> "_Timed":
        return _Timed(self.seconds, part)


class _Timed:
    def __init__(self, seconds: dict[str, float], part: str) -> None:
        self.seconds, self.part = seconds, part

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        self.seconds[self.part] += time.perf_counter() - self.started


def batches(data: Weights, seed: int) -> Iterator[Weights]:
    """All sequences in an order that `seed` decides."""
    order = torch.randperm(len(data["hidden"]), generator=torch.Generator().manual_seed(seed))
    for rows in order.split(BATCH_SIZE):
        yield {name: tensor[rows] for name, tensor in data.items()}


@torch.no_grad()
def held_out_error(forward: Callable[[Weights], Tensor], data: Weights) -> Tensor:
    """Squared error relative to the target's energy."""
    sums = torch.zeros(2, dtype=torch.float64)
    for start in range(0, len(data["hidden"]), BATCH_SIZE):
        batch = {name: tensor[start : start + BATCH_SIZE] for name, tensor in data.items()}
        output, target = forward(batch), batch["target"]
        sums += torch.stack(((output - target).square().sum(), target.square().sum()))
    return sums[0] / sums[1]
