"""The local scopes: what the device holds while a window is reached, solved and trained, and the FLOPs of all windows.

Follows `recon.scopes.local`. With `offload: none` the whole model and all activations are on the device; otherwise
only the blocks of the window under way and one batch are.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from recon.planner.moment import (
    FP32,
    SOLVER_COPIES,
    SOLVER_ITERATIONS,
    Moment,
    adamw_bytes,
    adamw_temporary,
    held,
    numel,
)
from recon.planner.rehearsal import Rehearsal
from recon.planner.setting import Setting
from recon.windows import AttentionWindow, GroupWindow, Window


def windows_to_recover(rehearsal: Rehearsal, setting: Setting) -> list[Window]:
    """Those that hold a pruned weight.

    Raises:
        ValueError: If nothing is pruned.
    """
    if not setting.masked:
        raise ValueError(
            f"the {setting.scope} scope recovers windows that hold pruned weights, got no pattern; give one, or plan "
            f"scopes/full"
        )
    pruned = set(rehearsal.prunable(setting.exclude))
    return [window for window in rehearsal.windows(setting) if pruned.intersection(window.owned)]


def calibration_bytes(rehearsal: Rehearsal, setting: Setting) -> int:
    """Bytes of what enters and should leave the windows, for all calibration and held-out sequences."""
    copies = 2 + setting.taps
    if setting.scope == "block" and setting.stride is not None and setting.propagation == "dense":
        copies += -(-setting.num_blocks // setting.stride) - 1  # what enters windows that begin inside this one
    width = copies * rehearsal.dim
    if setting.groups is not None:
        width += max(rehearsal.features(window, setting) for window in windows_to_recover(rehearsal, setting))
    tokens = (setting.num_sequences + setting.num_validation) * setting.seq_len
    return tokens * width * rehearsal.dtype.itemsize


def local_moments(rehearsal: Rehearsal, setting: Setting) -> Iterator[Moment]:
    """The moments of one window of every kind."""
    whole = rehearsal.num_parameters * rehearsal.dtype.itemsize
    calibration = 0 if setting.offload != "none" else calibration_bytes(rehearsal, setting)
    given = rehearsal.given(setting)
    pruned = rehearsal.prunable(setting.exclude)
    all_masks = sum(module.get_parameter("weight").numel() for module in pruned.values())
    if setting.offload != "none":
        outside = rehearsal.num_parameters - sum(
            numel(block.parameters().values()) for block in rehearsal.anatomy.blocks
        )
        one = setting.batch_size * setting.seq_len * rehearsal.dim * rehearsal.dtype.itemsize
        yield Moment("embed", held(weights=outside * rehearsal.dtype.itemsize, other=2 * one))
    for window in _one_of_each(rehearsal, setting):
        weights = whole
        if setting.offload != "none":
            weights = rehearsal.dtype.itemsize * sum(numel(block.parameters().values()) for block in window.blocks)
        names = _pruned_in(window, list(pruned))
        base = held(weights=weights, calibration=calibration, other=given)
        gram = _gram_bytes(rehearsal, window, names, setting) if setting.collects else 0
        passing = max((rehearsal.passed(block, setting).forward for block in window.blocks), key=Counter.total)
        cast = _cast_bytes(rehearsal, window, names, setting) if setting.collects else 0
        yield Moment("collect", held(base, passing, gram=gram, other=cast))
        solving = _solve_moment(rehearsal, window, names, setting, base, gram)
        yield from solving
        # A gradient's mask is unpacked when it is first needed, and stays.
        masks = all_masks if setting.offload == "none" else sum(_weight(pruned, name).numel() for name in names)
        if setting.scope == "matrix":
            if setting.descent_steps:
                yield _descent_moment(pruned, names, held(base, gram=gram, masks=masks))
            continue
        learning = [rehearsal.parameters[name] for name in rehearsal.learning(window.owned, setting)]
        base = held(base, masks=masks, optimizer=adamw_bytes(learning), other=_waiting(rehearsal, window, setting))
        step = rehearsal.window(window, setting)
        yield Moment("forward", held(base, step.forward))
        yield Moment("backward", held(base, step.backward))
        gradients = sum(one.numel() * one.element_size() for one in learning)
        yield Moment("step", held(base, gradients=gradients, other=adamw_temporary(learning, setting.device)))


def local_flops(rehearsal: Rehearsal, setting: Setting) -> int:
    """FLOPs of the walk through the dense model, Gram matrices, solves, training and held-out errors."""
    pruned = rehearsal.prunable(setting.exclude)
    batches = setting.num_sequences / setting.batch_size
    held_out = setting.num_validation / setting.batch_size
    walks = 1 if setting.propagation == "dense" else 2  # the recovered stream is another one
    total = 0.0
    seen: set[int] = set()
    for window in windows_to_recover(rehearsal, setting):
        for block in window.blocks:
            if block.index in seen:
                continue
            seen.add(block.index)
            total += walks * (batches + held_out) * rehearsal.passed(block, setting).flops
            names = list(block.weights_among(pruned))
            if setting.collects:
                tokens = setting.num_sequences * setting.seq_len
                total += 2 * tokens * sum(width**2 for width in rehearsal.inputs(block, names, setting))
            products = [2 * rehearsal.products(name) for name in names]
            total += setting.solves * SOLVER_ITERATIONS * sum(products)
            total += 3 * setting.descent_steps * sum(products)
        if setting.scope == "matrix":
            total += 2 * held_out * sum(rehearsal.passed(block, setting).flops for block in window.blocks)
        else:
            step = rehearsal.window(window, setting)
            total += setting.epochs * batches * step.flops + (setting.epochs + 1) * held_out * step.forward_flops
    return round(total)


def solver_bytes(largest: Tensor) -> int:
    """What solving one matrix allocates; its fp32 copy where it is stored in 16 bits."""
    return FP32 * largest.numel() * (SOLVER_COPIES + 2 * (largest.element_size() < FP32))


def _solve_moment(
    rehearsal: Rehearsal, window: Window, names: Sequence[str], setting: Setting, base: Counter[str], gram: int
) -> Iterator[Moment]:
    """While matrices are solved their Gram matrices are there, and the solutions found."""
    if not setting.solves:
        return
    weights = [rehearsal.parameters[name] for name in names]
    found = FP32 * numel(weights)  # in the matrix scope: the dense weights, all cloned before the first is pruned
    yield Moment("solve", held(base, gram=gram, other=found + solver_bytes(max(weights, key=Tensor.numel))))


def _descent_moment(pruned: dict[str, nn.Module], names: Sequence[str], base: Counter[str]) -> Moment:
    weights = [_weight(pruned, name) for name in names]
    fp32 = FP32 * numel(weights)
    stored = sum(one.numel() * one.element_size() for one in weights)
    # Saved are the difference from the dense weights and its product; the dense weights and their targets stay.
    return Moment(
        "backward",
        held(base, gradients=stored, optimizer=adamw_bytes(weights), activations=2 * fp32, other=2 * fp32),
    )


def _waiting(rehearsal: Rehearsal, window: Window, setting: Setting) -> int:
    """Solutions of the block's later windows, and for groups the weights that have stepped aside."""
    block = window.blocks[0]
    matrices = {f"{name}.weight" for name in block.matrices}
    others = [rehearsal.parameters[name] for name in sorted(matrices.difference(window.owned))]
    later = rehearsal.dtype.itemsize * numel(others)
    if isinstance(window, GroupWindow):
        own = rehearsal.dtype.itemsize * sum(rehearsal.parameters[name].numel() for name in window.owned)
        return later + own
    return later if isinstance(window, AttentionWindow) and setting.solves else 0


def _gram_bytes(rehearsal: Rehearsal, window: Window, names: Sequence[str], setting: Setting) -> int:
    sums = 3 if setting.scope == "matrix" and setting.propagation == "recovered" else 1
    widths = [width for block in window.blocks for width in rehearsal.inputs(block, names, setting)]
    return sums * FP32 * sum(width**2 for width in widths)


def _cast_bytes(rehearsal: Rehearsal, window: Window, names: Sequence[str], setting: Setting) -> int:
    """The inputs of a matrix in fp32, where they come in 16 bits."""
    if rehearsal.dtype.itemsize >= FP32:
        return 0
    widths = [width for block in window.blocks for width in rehearsal.inputs(block, names, setting)]
    return FP32 * setting.batch_size * setting.seq_len * max(widths)


def _one_of_each(rehearsal: Rehearsal, setting: Setting) -> list[Window]:
    windows = windows_to_recover(rehearsal, setting)
    return list({rehearsal.kind(window, setting): window for window in windows}.values())


def _pruned_in(window: Window, pruned: Sequence[str]) -> list[str]:
    """The pruned matrices of its blocks: all are observed when the first window of a block is reached."""
    matrices = {f"{name}.weight" for block in window.blocks for name in block.matrices}
    return [name for name in pruned if name in matrices]


def _weight(pruned: dict[str, nn.Module], name: str) -> nn.Parameter:
    return pruned[name].get_parameter("weight")
