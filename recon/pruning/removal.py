"""Removal of whole experts: the choice of the survivors, and what masks tell about it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recon.basics.trees import tensors_in
from recon.calibration.activations import Activations
from recon.models.anatomy import Anatomy, Block
from recon.models.fewer_experts import Kept, num_experts_of, smaller, stacks
from recon.pruning.criteria import Criterion
from recon.pruning.criteria.experts import ExpertCriterion, Routing
from recon.pruning.masks import Masks
from recon.pruning.options import Pruning
from recon.pruning.patterns import Experts, Pattern
from recon.pruning.whole_slices import kept_slices, removes_slices

log = logging.getLogger("recon")


def require_removable(model: Any, anatomy: Anatomy, pattern: Experts) -> None:
    """Refuse a model whose experts cannot be removed, before anything is scored.

    Raises:
        ValueError: If it has none, too few would be left, or its router cannot work with those that are.
    """
    smaller(model, pattern.num_kept(num_experts_of(anatomy)))


def require_of_experts(criterion: Criterion, pattern: Pattern, options: Pruning) -> None:
    """Refuse a criterion or options that do not go with a pattern of experts, or the other way round.

    Raises:
        ValueError: Naming them.
    """
    if isinstance(criterion, ExpertCriterion) != isinstance(pattern, Experts):
        raise ValueError(
            f"whole experts are removed by a criterion that rates them, got criterion {criterion} and pattern "
            f"{pattern}; choose --criterion reap or frequency with --pattern experts, and neither without the other"
        )
    if not isinstance(pattern, Experts):
        return
    wrong = {
        "inputs": (options.inputs, "dense"),
        "experts": (options.experts, "routed"),
        "exclude": (options.exclude, []),
        "allocation": (options.allocation, None),
    }
    for name, (given, needed) in wrong.items():
        if given != needed:
            raise ValueError(
                f"pattern {pattern} needs pruning.{name} {needed}, got {given}: experts are rated by what the dense "
                f"router does, and each mixture keeps the same number; leave the option out"
            )


def remove(walk: Activations, criterion: ExpertCriterion, pattern: Experts) -> Masks:
    """Choose the surviving experts of every mixture.

    Args:
        walk: The dense model and calibration sequences, before the first block.
        criterion: Rates experts.
        pattern: How many survive.

    Returns:
        Masks of the stacked parameters: each slice is kept whole or pruned whole.

    Raises:
        ValueError: If what the experts do cannot be seen.
    """
    masks, anatomy = Masks({}), walk.replay.anatomy
    for block in anatomy.blocks:
        if not (sizes := stacks(block)):
            continue
        routing = _outputs(walk, block) if criterion.needs_outputs else _counts(walk, block)
        survivors = pattern.choose(criterion.rate(routing), block.name)
        named = {one.parameter_name: one.parameter for one in block.matrices.values() if one.parameter_name in sizes}
        for name, parameter in named.items():
            keep = torch.zeros(parameter.shape, dtype=torch.bool)
            keep[survivors] = True
            masks.add(Masks({name: keep}))
        said = f"block {block.index + 1}/{len(anatomy.blocks)}  experts {' '.join(map(str, survivors))} kept"
        log.info(f"prune  {said}  {criterion}  {pattern}")
    return masks


def kept_in(masks: Masks, model: PreTrainedModel) -> Kept:
    """Read the surviving experts of a model off its masks; none if they remove no whole experts.

    Raises:
        ValueError: If stacks of one block keep different experts.
    """
    kept: dict[int, list[int]] = {}
    for block in Anatomy.of(model).blocks if removes_slices(masks) else ():
        for name in stacks(block):
            if name not in masks or (survivors := kept_slices(masks, name)) is None:
                continue
            if kept.setdefault(block.index, survivors) != survivors:
                raise ValueError(
                    f"the stacks of a mixture need to lose the same experts, got {kept[block.index]} and {survivors} "
                    f"kept in {block.name}; use masks of `recon prune --pattern experts`"
                )
    return kept


def _counts(walk: Activations, block: Block) -> Routing:
    """Count the tokens of each expert by the rows that its matrices multiply with."""
    matrices = block.weights_among(stacks(block))
    statistics = walk.enter([block.index], matrices, "norms")
    counts: dict[str, list[int]] = {}
    for name, one in matrices.items():
        counts.setdefault(one.parameter_name, []).append(statistics[name].num_tokens)
    if any(one != next(iter(counts.values())) for one in counts.values()):
        raise ValueError(
            f"removing experts needs blocks with one mixture, got {block.name}, whose stacks {', '.join(counts)} "
            f"multiply with different tokens; choose a pattern of weights, such as --pattern 2:4"
        )
    tokens = torch.tensor(next(iter(counts.values())), dtype=torch.float32)
    return Routing(tokens, torch.zeros_like(tokens))


def _outputs(walk: Activations, block: Block) -> Routing:
    """Sum gate values times norms of outputs of each expert; the module of the experts gives one output at a time."""
    if len(block.experts) != 1:
        raise ValueError(
            f"reap needs the stacks of a mixture in one module, got {len(block.experts)} in {block.name}; choose "
            f"--criterion frequency"
        )
    num = next(iter(stacks(block).values()))
    routing = Routing(torch.zeros(num), torch.zeros(num))
    with _watched(block.experts[0], routing, block.name):
        walk.enter([block.index])
    if not routing.tokens.any():
        raise ValueError(
            f"reap needs to see the calls of experts, {block.name} made none; choose --criterion frequency"
        )
    return routing


@contextmanager
def _watched(experts: nn.Module, routing: Routing, name: str) -> Iterator[None]:
    inside, num = list[bool](), len(routing.tokens)

    @torch.no_grad()
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if inside:
            return
        index, gates = _routing_of((args, kwargs), num, name)
        inside.append(True)
        tokens, sums = torch.zeros(num, device=index.device), torch.zeros(num, device=index.device)
        for place in range(index.shape[1]):
            one, ones = index[:, place : place + 1], torch.ones_like(gates[:, :1])
            swapped = {id(index): one, id(gates): ones}
            alone = module(
                *(swapped.get(id(value), value) for value in args),
                **{key: swapped.get(id(value), value) for key, value in kwargs.items()},
            )
            norms = alone.reshape(len(index), -1).float().norm(dim=-1) * gates[:, place].float()
            is_sent = one[:, 0] < num  # one more stands for none
            where = one[:, 0].clamp(max=num - 1)
            tokens.index_add_(0, where, is_sent.float())
            sums.index_add_(0, where, torch.where(is_sent, norms, 0))
        routing.tokens += tokens.cpu()
        routing.weighted_norms += sums.cpu()
        inside.clear()

    handle = experts.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _routing_of(given: Any, num_experts: int, name: str) -> tuple[Tensor, Tensor]:
    """Find the chosen experts and their gate values, both [tokens, chosen], among the arguments of experts.

    Raises:
        ValueError: If they are not there.
    """
    tensors = list(tensors_in(given))
    for index in tensors:
        if index.ndim == 2 and not index.is_floating_point() and index.dtype != torch.bool:
            for gates in tensors:
                if gates.is_floating_point() and gates.shape == index.shape:
                    return index, gates
    got = ", ".join(f"{list(one.shape)} of {one.dtype}" for one in tensors)
    raise ValueError(
        f"reap needs experts that are called with the numbers of the {num_experts} chosen for each token and as many "
        f"gate values, got {got} in {name}; choose --criterion frequency"
    )
