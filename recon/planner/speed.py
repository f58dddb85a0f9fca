"""FLOP/s of this machine at the sizes of a model, measured on its first block with random weights.

The seconds include more than matrix products: norms, activation functions, masks, AdamW. They leave out the trainer's
own time in each step, a good part of the time of very small models.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from recon.calibration.gram import StartGram, products
from recon.calibration.statistics import Products, full_fp32
from recon.models.loading import ModelSource
from recon.models.matrices import parameters_of
from recon.models.offload.blocks import OffloadedBlocks
from recon.models.windows import BlockWindow, Window
from recon.planner.fake.model import FakeModel, only_first
from recon.planner.fake.replay import Unverified
from recon.planner.flops import Kind
from recon.planner.local import one_of_each
from recon.planner.options import PlanOptions
from recon.planner.prediction import Shape
from recon.scopes.losses import window_loss
from recon.scopes.model_loss import model_loss
from recon.solvers import ConjugateGradients, LeastSquares

REPEATS = 5
"""Measurements after one to warm up; the shortest counts, for other work on the machine makes them longer."""

SECONDS = 1.0
"""Limit of a measured training step, were it products alone; batches are halved until it holds."""

PRODUCT = 1024
"""Rows and columns of the product that gives a first estimate of the machine's speed."""

ITERATIONS = 20
"""Limit of the iterations of conjugate gradients while they are measured."""

Clock = Callable[[], float]
"""Seconds since any fixed time."""


def measured_speeds(
    source: ModelSource, options: PlanOptions, device: torch.device, clock: Clock = time.perf_counter
) -> dict[Kind, float]:
    """Measure the FLOP/s of one process, for every kind of FLOPs in a run.

    Args:
        source: The model; only its configuration is read.
        options: The options of the run.
        device: The device to measure.
        clock: The clock; `time.process_time` in one thread gives FLOPs per CPU second, also on a busy CPU.

    Raises:
        ValueError: If the model cannot be read.
    """
    block = _FirstBlock(source, options, device, clock)
    speeds: dict[Kind, float] = {"walk": block.walk()}
    if options.collects and block.names:
        speeds |= {"gram": block.gram(), "solve": block.solve("fp32")}
        if options.starts_exact:
            speeds["start"] = block.solve("tf32")
    return speeds | (block.windows() if options.is_local else block.full())


class _FirstBlock:
    """The first block of a model, with random numbers on a device; each method measures one kind.

    Args:
        source: The model.
        options: The options of the run.
        device: The device that computes.
        clock: The clock.
    """

    def __init__(self, source: ModelSource, options: PlanOptions, device: torch.device, clock: Clock) -> None:
        shape = Shape(source)
        self.asked, self.device, self.clock = options, device, clock
        self.fake = shape.fakes(options).trained if options.is_local else shape.fake(options)
        self.small = _smaller(options, self.fake, device, clock)
        self.stored = options.weights_dtype(shape.stored)
        self.model = source.hollow()
        self.offloaded = OffloadedBlocks(self.model, device)
        self.block = self.offloaded.anatomy.blocks[0]
        self.fake_block = self.fake.anatomy.blocks[0]
        _fill(list(self.block.parameters().values()), self.stored)
        self.replay = Unverified(self.model, self.offloaded.anatomy, self.offloaded)
        self.offloaded.hold([0])
        pruned = self.fake.prunable(options.exclude) if options.masked else {}
        self.matrices = self.fake_block.weights_among(pruned)
        self.names = list(parameters_of(self.matrices.values()))
        self.tokens = self.small.batch_size * self.small.seq_len

    def walk(self) -> float:
        """Measure the pass through the block."""
        hidden = self._hidden(self.stored)
        taps = self.small.taps and self.block.mixer is not None
        run = self.replay.run_and_tap if taps else self.replay.run
        with torch.no_grad():
            seconds = self._seconds(lambda: run(0, hidden))
        return self.fake.passed(self.fake_block, self.small).flops / seconds

    def gram(self) -> float:
        """Measure sums of products of inputs."""
        widths = [one.width for one in self.fake.inputs(self.fake_block, list(self.matrices), self.small)]
        inputs = [torch.randn(self.tokens, width, device=self.device, dtype=self.stored) for width in widths]
        sums = [torch.zeros(width, width, device=self.device) for width in widths]
        if self.asked.collects_for_starts:
            starts = [StartGram(total) for total in sums]
            seconds = self._seconds(lambda: [start.add(x) for start, x in zip(starts, inputs, strict=True)])
            return 2 * self.tokens * sum(products(width) for width in widths) / seconds

        def collect() -> None:
            with full_fp32(self.device):
                for total, x in zip(sums, inputs, strict=True):
                    total.addmm_(x.float().T, x.float())

        return 2 * self.tokens * sum(width**2 for width in widths) / self._seconds(collect)

    def solve(self, products: Products) -> float:
        """Measure the solution of the largest matrix."""
        rows, width = max((one.shape for one in self.matrices.values()), key=math.prod)
        inputs = torch.randn(2 * width, width, device=self.device)
        problem = LeastSquares(inputs.T @ inputs, torch.randn(rows, width, device=self.device))
        keep = torch.rand(rows, width, device=self.device) < 0.5
        iterations = max(1, min(ITERATIONS, width // 4))  # few enough that no row finishes and leaves
        solver = ConjugateGradients(tolerance=0.0, max_iterations=iterations, products=products)
        return 2 * iterations * rows * width**2 / self._seconds(lambda: solver.solve(problem, keep))

    def windows(self) -> dict[Kind, float]:
        """Measure training and held-out errors of the windows in the block."""
        for parameter in self.block.parameters().values():
            parameter.data = parameter.data.float()
        if self.asked.scope == "matrix":
            hidden = self._hidden(torch.float32)
            with torch.no_grad():
                seconds = self._seconds(lambda: self.replay.run(0, hidden))
            speed = self.fake.passed(self.fake_block, self.small).flops / seconds
            return {"held out": speed, "training": speed}
        windows = [one for one in one_of_each(self.fake, self.asked) if one.blocks[0].index == 0]
        if self.asked.scope == "block":
            windows = [BlockWindow(self.block.name, [self.block], list(self.block.parameters()), [])]
        asked = [self.fake.window(one, self.asked, self.stored) for one in windows]
        small = [self.fake.window(one, self.small, self.stored) for one in windows]
        return self._speeds(
            sum(one.flops for one in asked),
            sum(one.flops for one in small),
            sum(one.forward_flops for one in small),
            [self._trained(one.owned, self._loss_of(one)) for one in windows],
        )

    def full(self) -> dict[Kind, float]:
        """Measure training of blocks and of the rest of the model, and the held-out loss."""
        window = BlockWindow(self.block.name, [self.block], list(self.block.parameters()), [])
        steps = [self.fake.block(self.fake_block, options) for options in (self.asked, self.small)]
        trained = self._trained(window.owned, self._loss_of(window, enters_grad=True))
        blocks = self._speeds(steps[0].flops, steps[1].flops, steps[1].forward_flops, [trained])
        outside = [name for name, one in self.model.named_parameters() if one.device.type == "cpu"]
        outside = [name for name in outside if not name.startswith(f"{self.block.name.rpartition('.')[0]}.")]
        _fill([self.model.get_parameter(name) for name in outside], self.stored)
        tokens = torch.zeros(self.small.batch_size, self.small.seq_len, dtype=torch.long, device=self.device)

        rows = self.fake.chunk_rows(self.small)

        def loss() -> Tensor:
            return model_loss(self.model, tokens, self.asked.loss, self.model, rows=rows)  # pyright: ignore[reportArgumentType]

        owned = window.owned + (outside if self.asked.train == "all" else [])
        steps = [self.fake.head(options) for options in (self.asked, self.small)]
        with self.offloaded.rest_onloaded(), only_first(self.model, self.block):
            trained = self._trained(owned, loss)
        rest = self._speeds(steps[0].flops, steps[1].flops, steps[1].forward_flops, [trained])
        return {"training": blocks["training"], "rest": rest["training"], "held out": rest["held out"]}

    def _speeds(self, asked: int, small: int, forward: int, seconds: Sequence[tuple[float, float, float]]) -> dict:
        """Scale measured small steps to the asked ones; an update takes as long for both.

        Args:
            asked: FLOPs of the asked steps.
            small: FLOPs of the measured steps.
            forward: FLOPs of the measured forward passes.
            seconds: Seconds of each measured step: loss alone, forward and backward pass, update.
        """
        evaluated, passed, updated = (sum(kind) for kind in zip(*seconds, strict=True))
        step = passed * asked / small + updated / self.asked.accumulate
        return {"training": asked / step, "held out": forward / evaluated}

    def _trained(self, names: Sequence[str], loss_of: Callable[[], Tensor]) -> tuple[float, float, float]:
        """Measure the seconds of the loss alone, of forward and backward pass, and of an update."""
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

    def _seconds(self, run: Callable[[], object]) -> float:
        return _seconds(run, self.device, self.clock)


def _smaller(options: PlanOptions, fake: FakeModel, device: torch.device, clock: Clock) -> PlanOptions:
    """Shrink the batches until a training step is short."""
    a, b = (torch.randn(PRODUCT, PRODUCT, device=device) for _ in range(2))
    speed = 2 * PRODUCT**3 / _seconds(lambda: a @ b, device, clock)
    block = fake.anatomy.blocks[0]
    while True:
        if 3 * fake.passed(block, options).flops <= SECONDS * speed or options.batch_size * options.seq_len < 64:
            return options
        if options.batch_size > 1:
            options = replace(options, batch_size=options.batch_size // 2)
        else:
            options = replace(options, seq_len=options.seq_len // 2)


def _seconds(run: Callable[[], object], device: torch.device, clock: Clock) -> float:
    def once() -> float:
        started = clock()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - started

    once()
    return min(once() for _ in range(REPEATS))


def _fill(parameters: Sequence[torch.nn.Parameter], dtype: torch.dtype) -> None:
    """Give random numbers to hollow parameters, scaled so that activations keep their size."""
    for parameter in parameters:
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1.0
        parameter.data = (torch.randn(parameter.shape) * scale).to(dtype)
