"""Replays of tiny models, and their hidden states by other means."""

from torch import Tensor
from transformers import PreTrainedModel

from recon.models.anatomy import Anatomy
from recon.models.replay import Replay
from recon.models.windows import (
    Window,
    block_windows,
    group_windows,
    submodule_windows,
)
from tests.support.families import DEPTH

NAMES = [f"{index:03d}.{kind}" for index in range(DEPTH) for kind in ("attention", "mlp")]


def replay_of(model: PreTrainedModel) -> Replay:
    return Replay(model, Anatomy.of(model))


def states_in(model: PreTrainedModel, tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Block outputs and attention outputs of a plain forward pass, by hooks that know nothing of recon."""
    outputs: dict[str, list[Tensor]] = {"block": [], "attention": []}

    def keep(kind: str):
        return lambda module, args, out: outputs[kind].append(out[0] if isinstance(out, tuple) else out)

    handles = []
    for block in Anatomy.of(model).blocks:
        handles.append(block.module.register_forward_hook(keep("block")))
        handles.append(block.mixer.register_forward_hook(keep("attention")))
    model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return outputs["block"], outputs["attention"]


def halves(replay: Replay) -> list[list[str]]:
    """Every other matrix of a block, and the rest: groups that fit any family and cross attention and MLP."""
    block = replay.anatomy.blocks[0]
    patterns = ["*" + name.removeprefix(block.name) for name in block.matrices]
    return [patterns[::2], patterns[1::2]]


def all_windows(replay: Replay) -> list[Window]:
    return [
        *submodule_windows(replay),
        *block_windows(replay.anatomy, 2),
        *group_windows(replay, halves(replay)),
    ]
