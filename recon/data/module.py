"""The data of a run as Lightning knows it: token sequences for training, held-out validation and test."""

import hashlib
from collections.abc import Iterable
from typing import Any, Literal

import lightning as L
import torch.distributed as dist
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recon.data.checks import require_embeddings, require_positions, require_text
from recon.data.loader import ResumableLoader
from recon.data.sources import Split, StandardLibrary, TextSource
from recon.data.tokens import sequences

LARGEST = 2**31 - 1
"""Of every size: a typing error is refused before it is asked of memory."""

LARGEST_SEED = 2**32 - 1
"""Numpy takes no larger one."""


class TokenData(L.LightningDataModule):
    """Token sequences of one length: calibration from train, held-out validation, test.

    Pruning and recovery use the calibration sequences. Held-out errors and learning rates are measured on
    validation. Perplexity is measured on test, which nothing else sees. The choice of validation and test
    sequences does not depend on the seed, so runs with several seeds share them.

    For your own data derive a class from this one, and name it: `--data my_module.MyData`. Override `tokens` if they do
    not come from a `TextSource`, with `identity`, which tells two contents apart; any loader, whose batches need
    `input_ids`; and any hook of a LightningDataModule. `prepare_data` and `setup` (for `fit` and `test`) are called
    when a run begins, before the model is pruned, and again by Lightning around the fit, as is `teardown`. Tokens are
    asked for after the fit, too. Transfer hooks see each batch that is trained on: in full retraining `input_ids`, in
    local scopes the hidden states of a window.

    Args:
        source: Where the text comes from.
        num_sequences: Calibration sequences; all of the train split if null.
        seq_len: Tokens per sequence.
        num_validation: Validation sequences; all if null.
        num_test: Test sequences; all if null.
        batch_size: Sequences per batch in full retraining and in evaluation.
        seed: Chooses the calibration sequences and their order in every epoch.
    """

    def __init__(
        self,
        source: TextSource | None = None,
        num_sequences: int | None = 128,
        seq_len: int = 256,
        num_validation: int | None = 16,
        num_test: int | None = None,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = {"num_sequences": num_sequences, "num_validation": num_validation, "num_test": num_test}
        for name, value in sizes.items():
            if value is not None and not 1 <= value <= LARGEST:
                raise ValueError(f"data.{name} must be from 1 to {LARGEST} (or null for all), got {value}")
        for name, value, least in (("seq_len", seq_len, 2), ("batch_size", batch_size, 1)):
            if not least <= value <= LARGEST:
                raise ValueError(f"data.{name} must be from {least} to {LARGEST}, got {value}")
        if not 0 <= seed <= LARGEST_SEED:
            raise ValueError(f"data.seed must be from 0 to {LARGEST_SEED}, got {seed}")
        self.source = source or StandardLibrary()
        self.num = {"train": num_sequences, "validation": num_validation, "test": num_test}
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.evaluate_on: Literal["test", "validation"] = "test"
        self._tokens: dict[Split, Int64[Tensor, "num seq_len"]] = {}

    def identity(self) -> Any:
        """Tells this text from any other, for the fingerprint of a run: plain data for JSON."""
        return self.source.identity()

    def tokens(self, split: Split) -> Int64[Tensor, "num seq_len"]:
        """The sequences of `split`, tokenised at the first call.

        Raises:
            ValueError: If the split cannot be read, or holds too few tokens.
        """
        if split not in self._tokens:
            assert self.tokenizer is not None, "set TokenData.tokenizer first: tokens are the tokenizer's"
            self._tokens[split] = sequences(
                self.source.documents(split),
                self.tokenizer,
                self.seq_len,
                self.num[split],
                seed=self.seed if split == "train" else 0,
                separator=self.source.separator,
                origin=self._origin(split),
            )
        return self._tokens[split]

    def require(self, splits: Iterable[Split], model: PreTrainedModel) -> None:
        """Load and tokenise `splits` now, and check that `model` can take their sequences.

        A run calls this before its first expensive step.

        Args:
            splits: All that the run will ask for.
            model: Loaded, or without weights; its embeddings and positions are looked at.

        Raises:
            ValueError: With all faults at once: splits with too few tokens, sequences without text, ids without an
                embedding, sequences longer than the model's table of positions.
        """
        faults: dict[str, None] = {}  # each once: splits of one file have its faults in common
        for split in dict.fromkeys(splits):
            try:
                tokens, origin = self.tokens(split), self._origin(split)
                require_embeddings(tokens, model, origin)
                if self.tokenizer is not None:
                    require_text(tokens, self.tokenizer, origin)
            except ValueError as error:
                faults[str(error)] = None
        try:
            require_positions(self.seq_len, model)
        except ValueError as error:
            faults[str(error)] = None
        if faults:
            raise ValueError("; and ".join(faults))

    def forget(self, split: Split) -> None:
        """Let go of the sequences of `split`; they are tokenised again when they are asked for."""
        self._tokens.pop(split, None)

    def carving(self, split: Split) -> dict[str, str]:
        """How `split` was cut out of the train text, for the protocol of a report.

        Empty if it consists of documents of its own, or of documents chosen by hash.
        """
        is_cut = self.source.is_continuous and not self.source.has(split)
        return {"held_out": self.source.carving(split)} if is_cut else {}

    def _origin(self, split: Split) -> str:
        carving = self.source.carving(split)
        return f"the {split} split of {self.source}{f' (it has none: {carving})' if carving else ''}"

    def fingerprint(self, split: Split) -> str:
        """Sha256 over the token ids of `split`."""
        return hashlib.sha256(self.tokens(split).numpy().tobytes()).hexdigest()

    def train_dataloader(self) -> DataLoader:
        """Batches {"input_ids": int64[batch, seq_len]} of the train split, in a new seeded order every epoch.

        In distributed training each process gets its own share of the sequences.
        """
        # A DistributedSampler also for one process, because Lightning tells it the epoch: every epoch has its own
        # order, and a resumed run sees the same. Lightning leaves such a sampler as it is, so the share is set here.
        sequences = _Sequences(self.tokens("train"))
        distributed = dist.is_available() and dist.is_initialized()
        processes, rank = (dist.get_world_size(), dist.get_rank()) if distributed else (1, 0)
        sampler = DistributedSampler(sequences, num_replicas=processes, rank=rank, seed=self.seed)
        return ResumableLoader(sequences, batch_size=self.batch_size, sampler=sampler)

    def val_dataloader(self) -> DataLoader:
        """Batches of the validation split, in order."""
        return DataLoader(_Sequences(self.tokens("validation")), batch_size=self.batch_size)

    def test_dataloader(self) -> DataLoader:
        """Batches of the test split, in order."""
        return DataLoader(_Sequences(self.tokens("test")), batch_size=self.batch_size)

    def evaluation_dataloader(self) -> DataLoader:
        """Batches of the split `evaluate_on`, which a run sets for its perplexity."""
        return self.test_dataloader() if self.evaluate_on == "test" else self.val_dataloader()


class _Sequences(Dataset):
    """Rows of a token matrix as dicts for a causal language model."""

    def __init__(self, tokens: Int64[Tensor, "num seq_len"]) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index]}
