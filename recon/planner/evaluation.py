"""Measuring the dense, the pruned and the recovered model before and after the fit: bytes on the device.

Follows `recon.experiment.measurement`. Whole models are measured whole, in the precision in which they are loaded;
offloaded ones block by block, then under the head. The dense model of the scope is on the device while baselines are
measured on a copy of it, for it is pruned there. After the fit the scope's model is written and let go of.
"""

from collections import Counter
from collections.abc import Iterator

import torch

from recon.calibration.storage import Budget
from recon.evaluation.perplexity import CHUNK
from recon.planner.fake.model import FakeModel, only_first
from recon.planner.fake.tracker import Tracker
from recon.planner.full import learning, optimizer_bytes
from recon.planner.options import PlanOptions
from recon.planner.snapshot import FP32, Snapshot, held, numel

KL_COPIES = 5
"""Of a chunk of logits in fp32: both distributions, and the exponential, the difference and the product in KL."""


def evaluation_snapshots(fake: FakeModel, options: PlanOptions) -> Iterator[Snapshot]:
    """Yield the snapshots of the evaluations that `options` asks for.

    Args:
        fake: The model in the precision in which it is loaded.
        options: The options of the run.
    """
    whole = options.offload == "none"
    if not options.evaluates or (options.partitioned and whole):  # evaluated where it is, in the fit
        return
    yield from _of_whole(fake, options) if whole else _of_offloaded(fake, options)


def _of_whole(fake: FakeModel, options: PlanOptions) -> Iterator[Snapshot]:
    one = fake.num_parameters * fake.item + fake.buffer_bytes
    scored, compared = _scored(fake, options), _compared(fake, options)
    if options.baselines and options.masked:
        yield Snapshot("baselines", held(weights=2 * one, other=scored))
    left = _left_by_fit(fake, options)
    yield Snapshot("evaluate", held(left, weights=one, other=scored))
    if options.drift and options.masked:
        yield Snapshot("drift", held(left, weights=2 * one, other=compared))


def _of_offloaded(fake: FakeModel, options: PlanOptions) -> Iterator[Snapshot]:
    blocks = [fake.block_numel(block) for block in fake.anatomy.blocks]
    outside = (fake.num_parameters - sum(blocks)) * fake.item + fake.buffer_bytes
    block, width = max(blocks) * fake.item, fake.dim * fake.item * options.seq_len
    scored, batch = _scored(fake, options, blockwise=True), options.evaluation_batch_size * width

    def kept(number: int | None, copies: int) -> int:
        """Hidden states of all sequences on the device; of a split of unknown length none."""
        nbytes, budget = (number or 0) * width, Budget(options.activations_budget, options.activations_host_budget)
        on_device = 0
        for _ in range(copies):
            place = budget.choose(nbytes) if options.activations == "auto" else options.activations
            budget.left[place] -= nbytes
            on_device += nbytes * (place == "device")
        return on_device

    of_test = kept(options.num_test, copies=2)
    if options.baselines and options.masked:  # the scope's walk has left a block there
        yield Snapshot("baselines", held(weights=outside + block, calibration=of_test, other=scored + batch))
    left = _left_by_fit(fake, options)
    yield Snapshot("evaluate", held(left, weights=outside, calibration=of_test, other=scored + batch))
    if options.drift and options.masked:
        compared = _compared(fake, options, blockwise=True) + 2 * batch
        calibration = kept(options.num_validation, copies=4)
        yield Snapshot("drift", held(left, weights=2 * outside, calibration=calibration, other=compared))


def _left_by_fit(fake: FakeModel, options: PlanOptions) -> Counter[str]:
    """Bytes that the optimizer of full retraining still refers to on a CPU."""
    if options.is_local or options.device != "cpu" or options.sharding != "none":
        return Counter()
    return held(weights=numel(learning(fake, options)) * fake.item, optimizer=optimizer_bytes(fake, options))


def _scored(fake: FakeModel, options: PlanOptions, blockwise: bool = False) -> int:
    """Bytes of a perplexity beside the weights."""
    size, passed = _logits(fake, options), _passed(fake, options, blockwise)
    return max(passed, size + _chunk(fake, options) * (1 + (fake.item < FP32)))


def _compared(fake: FakeModel, options: PlanOptions, blockwise: bool = False) -> int:
    """Bytes of a drift beside the weights: logits of both models, and all hidden states of a batch in the dense one."""
    size, passed = _logits(fake, options), _passed(fake, options, blockwise)
    hidden = 0 if blockwise else len(fake.anatomy.blocks) * _batch(options) * options.seq_len * fake.dim * fake.item
    return max(hidden + passed, size + passed, 2 * size + KL_COPIES * _chunk(fake, options))


def _batch(options: PlanOptions) -> int:
    return options.evaluation_batch_size


def _logits(fake: FakeModel, options: PlanOptions) -> int:
    return _batch(options) * options.seq_len * fake.model.config.get_text_config().vocab_size * fake.item


def _chunk(fake: FakeModel, options: PlanOptions) -> int:
    """Bytes of the logits in fp32 of the tokens that are scored at a time."""
    return min(CHUNK, options.seq_len - 1) * fake.model.config.get_text_config().vocab_size * FP32


def _passed(fake: FakeModel, options: PlanOptions, blockwise: bool) -> int:
    """Bytes at the largest moment of a forward pass, logits included; block by block the head's alone."""
    tokens = torch.Size((_batch(options), options.seq_len))
    with fake.faked(), torch.no_grad():
        ids = torch.zeros(tokens, dtype=torch.long)
        hidden = torch.empty((*tokens, fake.dim), dtype=fake.dtype)
        with only_first(fake.model, fake.anatomy.blocks[0]), Tracker([*fake.parameters.values(), ids, hidden]) as one:
            _ = fake.replay.head(ids, hidden) if blockwise else fake.model(input_ids=ids, use_cache=False).logits
        return one.peak.total()
