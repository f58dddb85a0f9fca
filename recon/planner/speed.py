"""FLOP/s of this machine at the sizes of a model: its first block, with random weights, is passed, solved and trained.

What is not a matrix product is part of it: norms, activation functions, masks, AdamW. What a trainer adds to each step
is not, and makes up a good part of the time of very small models.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from recon.calibration.statistics import full_fp32
from recon.models.loading import ModelSource
from recon.models.offload.blocks import OffloadedBlocks
from recon.models.windows import BlockWindow, Window
from recon.planner.fake.model import Rehearsal, Unverified, only_first
from recon.planner.fake.step import model_loss
from recon.planner.flops import Kind
from recon.planner.local import one_of_each
from recon.planner.options import Setting
from recon.planner.prediction import Shape
from recon.scopes.losses import window_loss
from recon.solvers import ConjugateGradients, LeastSquares

REPEATS = 5
"""Measurements of which the shortest counts, for what else a machine does makes it longer; after one to warm up."""

SECONDS = 1.0
"""That a training step may take while it is measured, were it all products: batches are made smaller until it does."""

PRODUCT = 1024
"""Rows and columns of the product that tells how fast the machine is at all."""

ITERATIONS = 20
"""Of conjugate gradients, while they are measured: at most."""


Clock = Callable[[], float]
"""Seconds since whenever."""


def measured_rates(
    source: ModelSource, setting: Setting, device: torch.device, clock: Clock = time.perf_counter
) -> dict[Kind, float]:
    """FLOP/s of one process, for every kind of work that a run has.

    Args:
        source: The model, of which only the configuration is read.
        setting: The options.
        device: Which one to measure.
        clock: By which; with `time.process_time` in one thread, FLOPs per second of a CPU that has other work.

    Raises:
        ValueError: If the model cannot be read.
    """
    stage = _Stage(source, setting, device, clock)
    rates: dict[Kind, float] = {"walk": stage.walk()}
    if setting.collects and stage.names:
        rates |= {"gram": stage.gram(), "solve": stage.solve()}
    return rates | (stage.windows() if setting.is_local else stage.whole())


class _Stage:
    """A model whose first block has numbers.

    Args:
        source: The model.
        setting: The options.
        device: Where to compute.
        clock: What tells the time.
    """

    def __init__(self, source: ModelSource, setting: Setting, device: torch.device, clock: Clock) -> None:
        shape = Shape(source)
        self.asked, self.device, self.clock = setting, device, clock
        self.fake = shape.cast(setting).trained if setting.is_local else shape.rehearsal(setting)
        self.small = _smaller(setting, self.fake, device, clock)
        self.stored = setting.weights_dtype(shape.stored)
        self.model = source.hollow()
        self.residence = OffloadedBlocks(self.model, device)
        self.block = self.residence.anatomy.blocks[0]
        self.fake_block = self.fake.anatomy.blocks[0]
        _fill(list(self.block.parameters().values()), self.stored)
        self.replay = Unverified(self.model, self.residence.anatomy, self.residence)
        self.residence.hold([0])
        pruned = self.fake.prunable(setting.exclude) if setting.masked else {}
        self.names = [name for name in self.block.parameters() if name in pruned]
        self.tokens = self.small.batch_size * self.small.seq_len

    def walk(self) -> float:
        """Passing a block."""
        hidden = self._hidden(self.stored)
        run = self.replay.run_and_tap if self.small.taps else self.replay.run
        with torch.no_grad():
            seconds = self._seconds(lambda: run(0, hidden))
        return self.fake.passed(self.fake_block, self.small).flops / seconds

    def gram(self) -> float:
        """Sums of products of inputs."""
        widths = self.fake.inputs(self.fake_block, self.names, self.small)
        inputs = [torch.randn(self.tokens, width, device=self.device, dtype=self.stored) for width in widths]
        sums = [torch.zeros(width, width, device=self.device) for width in widths]

        def collect() -> None:
            with full_fp32(self.device):
                for total, x in zip(sums, inputs, strict=True):
                    total.addmm_(x.float().T, x.float())

        return 2 * self.tokens * sum(width**2 for width in widths) / self._seconds(collect)

    def solve(self) -> float:
        """Exact solutions, by the largest matrix."""
        name = max(self.names, key=lambda name: self.fake.parameters[name].numel())
        rows, width = self.fake.shape_of(name)
        inputs = torch.randn(2 * width, width, device=self.device)
        problem = LeastSquares(inputs.T @ inputs, torch.randn(rows, width, device=self.device))
        keep = torch.rand(rows, width, device=self.device) < 0.5
        iterations = max(1, min(ITERATIONS, width // 4))  # so many that no row is solved, for it would leave
        solver = ConjugateGradients(tolerance=0.0, max_iterations=iterations)
        return 2 * iterations * rows * width**2 / self._seconds(lambda: solver.solve(problem, keep))

    def windows(self) -> dict[Kind, float]:
        """Training, and held-out errors, of the windows in the block."""
        for parameter in self.block.parameters().values():
            parameter.data = parameter.data.float()
        if self.asked.scope == "matrix":
            hidden = self._hidden(torch.float32)
            with torch.no_grad():
                seconds = self._seconds(lambda: self.replay.run(0, hidden))
            rate = self.fake.passed(self.fake_block, self.small).flops / seconds
            return {"held out": rate, "training": rate}
        windows = [one for one in one_of_each(self.fake, self.asked) if one.blocks[0].index == 0]
        if self.asked.scope == "block":
            windows = [BlockWindow(self.block.name, [self.block], list(self.block.parameters()), [])]
        asked = [self.fake.window(one, self.asked, self.stored) for one in windows]
        small = [self.fake.window(one, self.small, self.stored) for one in windows]
        return self._rates(
            sum(one.flops for one in asked),
            sum(one.flops for one in small),
            sum(one.forward_flops for one in small),
            [self._trained(one.owned, self._loss_of(one)) for one in windows],
        )

    def whole(self) -> dict[Kind, float]:
        """Training of blocks, of the rest of the model, and the held-out loss."""
        window = BlockWindow(self.block.name, [self.block], list(self.block.parameters()), [])
        steps = [self.fake.block(self.fake_block, setting) for setting in (self.asked, self.small)]
        trained = self._trained(window.owned, self._loss_of(window, enters_grad=True))
        blocks = self._rates(steps[0].flops, steps[1].flops, steps[1].forward_flops, [trained])
        outside = [name for name, one in self.model.named_parameters() if one.device.type == "cpu"]
        outside = [name for name in outside if not name.startswith(f"{self.block.name.rpartition('.')[0]}.")]
        _fill([self.model.get_parameter(name) for name in outside], self.stored)
        tokens = torch.zeros(self.small.batch_size, self.small.seq_len, dtype=torch.long, device=self.device)

        def loss() -> Tensor:
            return model_loss(lambda ids: self.model(input_ids=ids, use_cache=False).logits, tokens, self.asked.loss)

        owned = window.owned + (outside if self.asked.train == "all" else [])
        steps = [self.fake.head(setting) for setting in (self.asked, self.small)]
        with self.residence.rest_onloaded(), only_first(self.model, self.block):
            trained = self._trained(owned, loss)
        rest = self._rates(steps[0].flops, steps[1].flops, steps[1].forward_flops, [trained])
        return {"training": blocks["training"], "rest": rest["training"], "held out": rest["held out"]}

    def _rates(self, asked: int, small: int, forward: int, seconds: Sequence[tuple[float, float, float]]) -> dict:
        """Rates of steps of so many FLOPs, of which smaller ones were measured; an update takes as long for both."""
        evaluated, passed, updated = (sum(kind) for kind in zip(*seconds, strict=True))
        step = passed * asked / small + updated / self.asked.accumulate
        return {"training": asked / step, "held out": forward / evaluated}

    def _trained(self, names: Sequence[str], loss_of: Callable[[], Tensor]) -> tuple[float, float, float]:
        """Seconds of the loss alone, of forward and backward pass, and of an update."""
        with torch.no_grad():
            evaluated = self._seconds(loss_of)
        learning = {name: self.model.get_parameter(name).requires_grad_(True) for name in names}
        keep = {
            name: torch.rand(learning[name].shape, device=self.device) < 0.5 for name in self.names if name in names
        }
        optimizer = torch.optim.AdamW(learning.values(), lr=1e-6)

        def passes() -> None:
            optimizer.zero_grad()
            with torch.autocast(self.device.type, dtype=self.small.half, enabled=self.small.autocasts):
                loss = loss_of()
            loss.backward()
            for name, mask in keep.items():
                gradient = learning[name].grad
                assert gradient is not None
                torch.where(mask, gradient, 0)

        found = evaluated, self._seconds(passes), self._seconds(optimizer.step)
        for parameter in learning.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        return found

    def _loss_of(self, window: Window, enters_grad: bool = False) -> Callable[[], Tensor]:
        dtype = next(iter(self.block.parameters().values())).dtype
        hidden = self._hidden(dtype).requires_grad_(enters_grad)
        attention = self._hidden(dtype) if window.takes_attention else None
        width = self.fake.features(window, self.small)
        target = torch.randn(*hidden.shape[:2], width, device=self.device)
        loss = self.small.loss if self.small.is_local else "mse"
        return lambda: window_loss(window.forward(self.replay, hidden, attention).float(), target, loss)

    def _hidden(self, dtype: torch.dtype) -> Tensor:
        shape = self.small.batch_size, self.small.seq_len, self.fake.dim
        return torch.randn(shape, device=self.device, dtype=dtype)

    def _seconds(self, work: Callable[[], object]) -> float:
        return _seconds(work, self.device, self.clock)


def _smaller(setting: Setting, fake: Rehearsal, device: torch.device, clock: Clock) -> Setting:
    """With batches of which a training step does not take long."""
    a, b = (torch.randn(PRODUCT, PRODUCT, device=device) for _ in range(2))
    rate = 2 * PRODUCT**3 / _seconds(lambda: a @ b, device, clock)
    block = fake.anatomy.blocks[0]
    while True:
        if 3 * fake.passed(block, setting).flops <= SECONDS * rate or setting.batch_size * setting.seq_len < 64:
            return setting
        if setting.batch_size > 1:
            setting = replace(setting, batch_size=setting.batch_size // 2)
        else:
            setting = replace(setting, seq_len=setting.seq_len // 2)


def _seconds(work: Callable[[], object], device: torch.device, clock: Clock) -> float:
    def once() -> float:
        started = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - started

    once()
    return min(once() for _ in range(REPEATS))


def _fill(parameters: Sequence[torch.nn.Parameter], dtype: torch.dtype) -> None:
    """Give numbers to parameters that share a single one: such that what is computed stays of one size."""
    for parameter in parameters:
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1.0
        parameter.data = (torch.randn(parameter.shape) * scale).to(dtype)
