"""The data of a run as Lightning knows it: token sequences for training, held-out validation and test."""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, Literal

import lightning as L
import torch.distributed as dist
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recon.data.checks import require_embeddings, require_positions, require_text, require_tokenizer
from recon.data.loader import ResumableLoader, SeededOrder
from recon.data.shards import MappedSequences
from recon.data.sources import StandardLibrary, TextSource
from recon.data.token_cache import TokenCache
from recon.data.token_source import Author, Draw, Split, TokenSource

LARGEST = 2**31 - 1
"""Of every size: a typing error is refused before it is asked of memory."""

MOST_WORKERS = 1024
"""As `LARGEST`."""

LARGEST_SEED = 2**32 - 1
"""Numpy takes no larger one."""


class TokenData(L.LightningDataModule):
    """Token sequences of one length: calibration from train, held-out validation, test.

    Pruning and recovery use the calibration sequences. Held-out errors and learning rates are measured on
    validation. Perplexity is measured on test, which nothing else sees. The choice of validation and test
    sequences does not depend on the seed, so runs with several seeds share them, unless `sample_seed` differs.

    With `held_out` the model is calibrated on one text and measured on another: the train split is then that of
    `source`, and validation and test are those of `held_out`.

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
        held_out: Where validation and test text comes from; `source` if null. Text that the model itself writes needs
            one, since perplexity is measured on text that people wrote.
        max_tokens: Tokens that full retraining trains on, from a cache on disk. They are whole sequences of the train
            split; the calibration sequences if null. Pruning and exact starts use the calibration sequences.
        num_workers: Processes that tokenise, and load batches of full retraining. The run's own does if 0.
        cache: Directory of the tokens of `max_tokens`. All runs and ranks share it.
        sample_seed: Chooses the validation and test sequences.

    Attributes:
        tokenizer: Of the model; set when that is loaded, as `author` is.
        author: The dense model, for text that it writes; None where that is written already, or not asked for.
    """

    def __init__(
        self,
        source: TokenSource | None = None,
        num_sequences: int | None = 128,
        seq_len: int = 256,
        num_validation: int | None = 16,
        num_test: int | None = None,
        batch_size: int = 8,
        seed: int = 0,
        held_out: TokenSource | None = None,
        max_tokens: int | None = None,
        num_workers: int = 0,
        cache: str = "runs/tokens",
        sample_seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = {"num_sequences": num_sequences, "num_validation": num_validation, "num_test": num_test}
        for name, value in sizes.items():
            if value is not None and not 1 <= value <= LARGEST:
                raise ValueError(f"data.{name} must be from 1 to {LARGEST} (or null for all), got {value}")
        for name, value, least in (("seq_len", seq_len, 2), ("batch_size", batch_size, 1)):
            if not least <= value <= LARGEST:
                raise ValueError(f"data.{name} must be from {least} to {LARGEST}, got {value}")
        if max_tokens is not None and max_tokens < seq_len:
            raise ValueError(
                f"data.max_tokens must be at least data.seq_len, {seq_len}, one sequence (or null for the calibration "
                f"sequences), got {max_tokens}"
            )
        if not 0 <= num_workers <= MOST_WORKERS:
            raise ValueError(f"data.num_workers must be from 0 to {MOST_WORKERS}, got {num_workers}")
        for name, value in (("seed", seed), ("sample_seed", sample_seed)):
            if not 0 <= value <= LARGEST_SEED:
                raise ValueError(f"data.{name} must be from 0 to {LARGEST_SEED}, got {value}")
        self.source = source or StandardLibrary()
        self.held_out = held_out
        text = held_out or self.source
        if text.is_written:
            raise ValueError(
                f"validation and test need text that people wrote, got {text}; give the text to measure on as "
                f"data.held_out, for example --data.held_out StandardLibrary"
            )
        self.num = {"train": num_sequences, "validation": num_validation, "test": num_test}
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.max_tokens, self.num_workers, self.cache = max_tokens, num_workers, cache
        self.seed, self.sample_seed = seed, sample_seed
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.author: Author | None = None
        self.evaluate_on: Literal["test", "validation"] = "test"
        self._tokens: dict[Split, Int64[Tensor, "num seq_len"]] = {}

    def identity(self) -> Any:
        """Tells this text from any other, for the fingerprint of a run: plain data for JSON."""
        source = self.source.identity()
        return source if self.held_out is None else {"source": source, "held_out": self.held_out.identity()}

    def source_of(self, split: Split) -> TokenSource:
        """Where the text of `split` comes from."""
        return self.source if split == "train" or self.held_out is None else self.held_out

    def require_tokenizer(self, load: Callable[[], PreTrainedTokenizerBase]) -> None:
        """Refuse a tokenizer that a source cannot use, before the model is loaded.

        Args:
            load: Loads the tokenizer; called only if there is a source that needs more than one that encodes text.

        Raises:
            ValueError: Naming what it lacks, and the cure.
        """
        for source in filter(None, (self.source, self.held_out)):
            if source.is_particular:
                require_tokenizer(source, load())

    def tokens(self, split: Split) -> Int64[Tensor, "num seq_len"]:
        """The sequences of `split`, tokenised at the first call.

        Raises:
            ValueError: If the split cannot be read, or holds too few tokens.
        """
        if split not in self._tokens:
            assert self.tokenizer is not None, "set TokenData.tokenizer first: tokens are the tokenizer's"
            seed = self.seed if split == "train" else self.sample_seed
            draw = Draw(self.tokenizer, self.seq_len, self.num[split], seed, self.author)
            self._tokens[split] = self.source_of(split).sequences(split, draw)
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
                tokens, origin = self.tokens(split), self.source_of(split).origin(split)
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

    def stream(self) -> MappedSequences:
        """The sequences of `max_tokens` tokens of the train split, on disk, tokenised now as far as they are not there.

        Raises:
            ValueError: If the source is not made of documents, or holds too few tokens, or the disk is too small.
        """
        assert self.max_tokens is not None
        return self._token_cache().sequences(self.max_tokens // self.seq_len, self.num_workers)

    def require_stream(self, model: PreTrainedModel) -> None:
        """Tokenise the sequences of `max_tokens` now, and check that each token has an embedding in `model`.

        Raises:
            ValueError: As `stream`, or if one has not.
        """
        self._token_cache().require_embeddings(self.stream(), model)

    def _token_cache(self) -> TokenCache:
        if not (isinstance(self.source, TextSource) and self.source.is_joined):
            raise ValueError(
                f"data.max_tokens needs a source of documents that are joined and cut, such as TextFiles, "
                f"got {self.source}; choose one, or leave it out and give data.num_sequences"
            )
        assert self.tokenizer is not None, "set TokenData.tokenizer first: tokens are the tokenizer's"
        return TokenCache(self.cache, self.source, self.tokenizer, self.seq_len)

    def forget(self, split: Split) -> None:
        """Let go of the sequences of `split`; they are tokenised again when they are asked for."""
        self._tokens.pop(split, None)

    def carving(self, split: Split) -> dict[str, str | int]:
        """What the protocol of a report says of the text of `split`.

        The name of `held_out`, if the text is of that, and how it was cut out of the train text, if it was. Empty if
        it consists of documents of `source` of its own, or chosen by hash. And `sample_seed`, if it is not 0.
        """
        source = self.source_of(split)
        named: dict[str, str | int] = {} if source is self.source else {"text": str(source)}
        if self.sample_seed != 0:
            named["sample"] = self.sample_seed
        return named | ({"held_out": cut} if (cut := source.cut(split)) else {})

    def fingerprint(self, split: Split) -> str:
        """Sha256 over the token ids of `split`."""
        return hashlib.sha256(self.tokens(split).numpy().tobytes()).hexdigest()

    def train_dataloader(self) -> DataLoader:
        """Batches {"input_ids": int64[batch, seq_len]} of the train split, in a new seeded order every epoch.

        They are those of `stream` if `max_tokens` is given, else those of `tokens`.
        In distributed training each process gets its own share of the sequences.
        """
        # A DistributedSampler also for one process, because Lightning tells it the epoch: every epoch has its own
        # order, and a resumed run sees the same. Lightning leaves such a sampler as it is, so the share is set here.
        sequences = _Sequences(self.tokens("train")) if self.max_tokens is None else self.stream()
        distributed = dist.is_available() and dist.is_initialized()
        processes, rank = (dist.get_world_size(), dist.get_rank()) if distributed else (1, 0)
        sampler = SeededOrder(sequences, num_replicas=processes, rank=rank, seed=self.seed)
        return ResumableLoader(sequences, batch_size=self.batch_size, sampler=sampler, num_workers=self.num_workers)

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
