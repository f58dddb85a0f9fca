"""What tests of scopes share: a tiny model on disk, tokens that can be learned, masks, a quiet trainer."""

from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from recon.data import TokenData
from recon.models.anatomy import Anatomy
from recon.models.matrices import parameters_of
from recon.pruning.masks import Masks
from recon.scopes import Scope
from tests.support.families import VOCABULARY, tiny

IGNORED = (
    r"ignore:The '(train|val)_dataloader' does not have many workers which may be a bottleneck",
    r"ignore:Found \d+ module\(s\) in eval mode at the start of training",
    r"ignore:The number of training batches \(\d+\) is smaller than the logging interval",
    r"ignore:The `srun` command is available on your system",
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated",
)
"""Lightning's hints about what is meant to be as it is, and a call of its own that torch has deprecated."""

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "max_epochs": -1,
}

AnyScope = TypeVar("AnyScope", bound=Scope)


def save_tiny(family: str, path: Path, **overrides: object) -> str:
    """Save a tiny model with a tokenizer that nobody calls; return the directory."""
    words = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
    directory = path / f"dense-{family}"
    if not directory.exists():
        tiny(family, **overrides).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return str(directory)


def learnable_tokens(num: int, seq: int, seed: int) -> Tensor:
    """Sequences in which two of three tokens follow from the one before."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (num, seq), generator=generator)
    follows = torch.rand(num, seq, generator=generator) < 2 / 3
    for position in range(1, seq):
        next_one = (3 * tokens[:, position - 1] + 1) % VOCABULARY
        tokens[:, position] = torch.where(follows[:, position], next_one, tokens[:, position])
    return tokens


def data_of(num: int = 10, validation: int = 5, seq: int = 16, batch_size: int = 4, seed: int = 0) -> TokenData:
    """Data whose tokens do not depend on the seed; neither number is a multiple of the batch size."""
    data = TokenData(num_sequences=num, seq_len=seq, num_validation=validation, batch_size=batch_size, seed=seed)
    splits = {"train": (num, 1), "validation": (validation, 2), "test": (validation, 3)}
    data._tokens = {split: learnable_tokens(count, seq, seed) for split, (count, seed) in splits.items()}  # type: ignore
    return data


def random_masks(model: Any, sparsity: float = 0.5, exclude: tuple[str, ...] = (), seed: int = 0) -> Masks:
    """Masks that a generator chose, weight by weight."""
    generator = torch.Generator().manual_seed(seed)
    weights = parameters_of(Anatomy.of(model).prunable(exclude).values())
    return Masks({name: torch.rand(weight.shape, generator=generator) >= sparsity for name, weight in weights.items()})


def trainer_of(*callbacks: Callback, **options: Any) -> L.Trainer:
    """A trainer that writes nothing and says nothing."""
    return L.Trainer(**{**QUIET, "callbacks": list(callbacks), **options})


def prepared(
    scope: AnyScope, data: TokenData | None = None, directory: Path | None = None, masks: Masks | None = None
) -> AnyScope:
    """Load and prepare `scope`, by default with random masks."""
    data = data or data_of()
    scope.load(data)
    scope.prepare(data, random_masks(scope.model) if masks is None else masks, directory)
    return scope


def weights_of(model: Any) -> dict[str, Tensor]:
    """A copy of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two models hold the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def untimed(results: Any) -> Any:
    """A scope's results without the seconds in them."""
    if not isinstance(results, dict):
        return results
    return {key: untimed(value) for key, value in results.items() if key != "seconds"}
