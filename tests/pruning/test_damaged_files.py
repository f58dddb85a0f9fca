"""Mask files and start weights that are damaged, foreign or of another version: refused by name."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from recon.pruning.masks import Masks
from recon.pruning.start_weights import Start

MASKS = Masks({"a.weight": torch.ones(4, 6, dtype=torch.bool), "b.weight": torch.zeros(3, 3, dtype=torch.bool)})


def rewritten(file: Path, tensors: Callable[[dict], dict] = dict, **header: str | None) -> None:
    """Write a mask file again with other tensors or another header; None drops an entry."""
    with safe_open(file, framework="pt") as opened:
        held = opened.metadata()
    content = {name: value for name, value in (held | header).items() if value is not None}
    save_file(tensors(load_file(file)), file, content)


SHAPES = {"a.weight": [4, 6], "b.weight": [3, 3]}

DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "garbage": (lambda file: file.write_bytes(b"hello"), "no safetensors file"),
    "empty": (lambda file: file.write_bytes(b""), "no safetensors file"),
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:-2]), "truncated"),
    "foreign": (lambda file: rewritten(file, format=None), "another kind"),
    "no shapes": (lambda file: rewritten(file, shapes=None), "no shapes"),
    "unreadable shapes": (lambda file: rewritten(file, shapes="{"), "shapes that cannot be read"),
    "list of shapes": (lambda file: rewritten(file, shapes="[1]"), "map no names"),
    "text as a shape": (lambda file: rewritten(file, shapes=json.dumps(SHAPES | {"b.weight": "33"})), "the shape '33'"),
    "negative": (lambda file: rewritten(file, shapes=json.dumps(SHAPES | {"b.weight": [-3, 3]})), r"shape \[-3, 3\]"),
    "one more shape": (lambda file: rewritten(file, shapes=json.dumps(SHAPES | {"c": [1]})), "`c` only as a shape"),
    "one mask less": (lambda file: rewritten(file, lambda held: {"b.weight": held["b.weight"]}), "`a.weight` only"),
    "floats": (
        lambda file: rewritten(file, lambda held: {name: one.float() for name, one in held.items()}),
        "float32 for `a.weight`",
    ),
    "short": (
        lambda file: rewritten(file, lambda held: held | {"a.weight": held["a.weight"][:2].clone()}),
        r"\[2\] of",
    ),
    "two dimensions": (
        lambda file: rewritten(file, lambda held: held | {"b.weight": held["b.weight"][None]}),
        r"\[1, 2\] of torch.uint8 for `b.weight`",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_masks_are_refused_by_name(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "masks.safetensors"
    MASKS.save(file)
    inflict, said = DAMAGES[damage]
    inflict(file)
    with pytest.raises(ValueError, match=rf"masks\.safetensors` needs .*{said}.*; |masks\.safetensors.*{said}"):
        Masks.load(file)


@pytest.mark.parametrize("metadata", [None, "{", "[]", '{"moved": 7}'])
def test_damaged_metadata_are_refused_by_name(metadata: str | None, tmp_path: Path) -> None:
    file = tmp_path / "masks.safetensors"
    MASKS.save(file, {"criterion": "wanda"})
    assert Masks.read_metadata(file) == {"criterion": "wanda"}
    rewritten(file, metadata=metadata)
    with pytest.raises(ValueError, match=r"masks\.safetensors` needs to be a whole mask file .* metadata.*; use that"):
        Masks.read_metadata(file)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda file: file.write_bytes(b"xx"), "whole safetensors file"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "whole safetensors file"),
        (lambda file: save_file({name: torch.zeros(*SHAPES[name]).int() for name in SHAPES}, file), "got I32 for"),
        (lambda file: save_file({"a.weight": torch.zeros(4, 6)}, file), "got 1 that differ"),
    ],
)
def test_damaged_start_weights_are_refused_by_name(damage: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    file = tmp_path / "moved.safetensors"
    save_file({name: torch.zeros(*shape) for name, shape in SHAPES.items()}, file)
    assert len(Start(file, MASKS)) == 2
    damage(file)
    with pytest.raises(ValueError, match=said) as refused:
        Start(file, MASKS)
    assert str(file) in str(refused.value)
    assert "prune again" in str(refused.value)
