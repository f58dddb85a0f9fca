"""Masks keep to the pattern that their file records, or are refused when they are loaded."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from recon.basics.manifest import Manifest
from recon.cli import main
from recon.models.matrices import Matrix
from recon.pruning.allocation.base import spread
from recon.pruning.masks import Masks
from recon.pruning.patterns import NM, Counted, Pattern, Unstructured
from recon.pruning.recorded_pattern import KEY, recorded

SHAPES = {"a": (6, 8), "b": (5, 24), "c": (7, 12), "d": (16, 16)}
TRANSPOSED = ("c",)  # stored in x out


def masks_of(pattern: Pattern) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}
    keep = {name: one.contiguous() for name, one in pattern.select_all(scores).items()}
    return {name: one.T.contiguous() if name in TRANSPOSED else one for name, one in keep.items()}


def matrices_of(transposed: tuple[str, ...]) -> list[Matrix]:
    return [Matrix(name, name, torch.nn.Identity(), is_transposed=True) for name in transposed]


def counted(per: str) -> Counted:
    (pattern,) = spread([0.43], [SHAPES], 289, Unstructured(0.57, per))  # pyright: ignore[reportArgumentType]
    return pattern


def move_within_row(keep: torch.Tensor) -> None:
    """Exchange a kept and a pruned weight of the first row: counts per row, matrix and model stay."""
    kept, pruned = keep[0].nonzero()[0, 0], (~keep[0]).nonzero()[-1, 0]
    keep[0, kept], keep[0, pruned] = False, True


def move_between_rows(keep: torch.Tensor) -> None:
    """Counts per matrix and model stay."""
    keep[0, keep[0].nonzero()[0, 0]] = False
    keep[-1, (~keep[-1]).nonzero()[0, 0]] = True


def one_more(keep: torch.Tensor) -> None:
    keep[-1, (~keep[-1]).nonzero()[0, 0]] = True


CASES: list[tuple[Pattern, Callable[[torch.Tensor], None], Callable[[torch.Tensor], None] | None]] = [
    (NM(2, 4), move_within_row, None),
    (NM(1, 2), move_within_row, None),
    (Unstructured(0.57, "row"), move_between_rows, move_within_row),
    (Unstructured(0.57, "matrix"), one_more, move_between_rows),
    (Unstructured(0.57, "model"), one_more, move_between_rows),
    (counted("row"), move_between_rows, move_within_row),
    (counted("matrix"), one_more, move_between_rows),
]
"""A pattern, a change that breaks it, and one that does not."""


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("pattern", "breaking", "harmless"), CASES, ids=lambda one: getattr(one, "__name__", str(one)))
def test_masks_that_break_their_pattern_are_refused(
    pattern: Pattern,
    breaking: Callable[[torch.Tensor], None],
    harmless: Callable[[torch.Tensor], None] | None,
    name: str,
    tmp_path: Path,
) -> None:
    keep, file = masks_of(pattern), tmp_path / "masks.safetensors"
    metadata = {"criterion": "x", "pattern": str(pattern), **recorded(pattern, matrices_of(TRANSPOSED))}
    Masks(keep).save(file, metadata)
    assert Masks.load(file) == Masks(keep)
    out_in = keep[name].T if name in TRANSPOSED else keep[name]  # views
    if harmless is not None:
        harmless(out_in)
        Masks(keep).save(file, metadata)
        Masks.load(file)
    breaking(out_in)
    Masks(keep).save(file, metadata)
    with pytest.raises(ValueError, match=rf"keep to the pattern that their file records.*{file.name}"):
        Masks.load(file)


def test_groups_of_any_length_are_counted(tmp_path: Path) -> None:
    for of, columns in ((3, 9), (8, 16), (16, 32), (6, 12)):
        keep = torch.zeros(5, columns // of, of, dtype=torch.bool)
        keep[..., :2] = True
        metadata = recorded(NM(2, of), ())
        Masks({"w": keep.view(5, columns)}).save(tmp_path / "m", metadata)
        Masks.load(tmp_path / "m")
        keep[-1, -1, -1] = True
        Masks({"w": keep.view(5, columns)}).save(tmp_path / "m", metadata)
        with pytest.raises(ValueError, match=f"3 of {of} weights in `w`, not 2"):
            Masks.load(tmp_path / "m")


def test_a_pattern_of_a_class_of_the_users_own_is_not_recorded() -> None:
    class Mine(NM):
        pass

    assert recorded(Mine(), ()) == {}


def test_an_unreadable_record_is_refused(tmp_path: Path) -> None:
    for text in ("", "[]", '{"pattern": "NM"}', '{"pattern": "Other", "transposed": []}'):
        Masks({"w": torch.ones(2, 4, dtype=torch.bool)}).save(tmp_path / "m", {KEY: text})
        with pytest.raises(ValueError, match="their record of a pattern cannot be read"):
            Masks.load(tmp_path / "m")


def test_fit_refuses_masks_that_violate_2_4_with_the_counts_kept(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shape = (
        "{model_type: gpt2, vocab_size: 2048, n_embd: 16, n_layer: 1, n_head: 2, n_positions: 64, "
        "tie_word_embeddings: true}"
    )
    options = ["--model.name=random", f"--model.shape={shape}", "--data.num_sequences=4", "--data.seq_len=32"]
    options += ["--data.num_validation=2", "--data.num_test=2", "--drift=false", "--summary=false", "--baselines=false"]
    run, file = tmp_path / "run", tmp_path / "bad.safetensors"
    assert main(["prune", *options, "--pattern=2:4", "--run_dir", str(run)]) == 0
    masks, known = Masks.load(run / "masks.safetensors"), Masks.read_metadata(run / "masks.safetensors")
    keep = dict(masks)
    move_within_row(next(iter(keep.values())).T)  # Conv1D is in x out
    Masks(keep).save(file, known)
    assert Masks(keep).num_pruned == masks.num_pruned
    capsys.readouterr()
    assert main(["fit", "-c", "scopes/matrix", *options, "--masks", str(file), "--run_dir", str(tmp_path / "fit")]) == 1
    assert "bad.safetensors" in capsys.readouterr().err
    assert Manifest(run).fault(run / "masks.safetensors") is None
