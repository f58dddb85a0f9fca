"""Text that the dense model writes, kept in a directory that runs with the same model and options share."""

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recon.basics.digests import digest
from recon.basics.files import write_json
from recon.basics.locks import locked
from recon.basics.manifest import Manifest
from recon.basics.seeds import derived_seed
from recon.data.checks import require_tokenizer
from recon.data.packing import packed
from recon.data.token_source import Author, Draw, Sampling, Split, TokenSource

log = logging.getLogger("recon")

MOST = 8
"""Texts dropped per text kept before a run gives up, with a batch kept in its favour."""

GRAM = 4
"""Tokens of the pieces whose repetition is counted."""


class SelfGenerated(TokenSource):
    """Text that the dense model writes itself, for calibration without any text of people.

    Each text begins with a prompt and goes on until the model ends it or a sequence is full. A sequence begins where a
    text begins; if that ends early, the next follows behind its end token. The prompt is a part of the text.

    Only the train split is written. Validation and test need a text of people: `data.held_out`.

    What is written lies in `cache`, a batch a file, in a directory named by a digest of all that decides it: weights
    and tokenizer of the model, prompts, sampling, `data.seq_len`, the seed and the versions of libraries. Runs that
    share all this share the text. A killed run goes on behind the last whole batch, with the same text. A smaller
    number of sequences is the beginning of a larger one. Filters are applied when the text is read.

    Args:
        prompts: Where the beginnings of texts come from, from its train split; a single token if null.
        prompt_tokens: Length of such a beginning.
        first_token: Without prompts: `random`, any token but a special one, or `bos`, the token that begins a text.
        temperature: Divides the logits; below 1 for text that is more likely and less varied.
        top_k: Choose among this many likeliest tokens; among all if null.
        top_p: Choose among the likeliest tokens that together have this probability; among all if null.
        min_tokens: Drop texts that are shorter.
        max_repetition: Drop texts of which a larger share repeats itself: 1 - distinct / all pieces of four tokens.
        batch_size: Texts written at a time.
        cache: Directory of all that was written.
    """

    is_written = True
    is_particular = True

    def __init__(
        self,
        prompts: TokenSource | None = None,
        prompt_tokens: int = 16,
        first_token: Literal["random", "bos"] = "random",
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_tokens: int = 16,
        max_repetition: float = 0.5,
        batch_size: int = 32,
        cache: str = "runs/generated",
    ) -> None:
        self.prompts, self.prompt_tokens, self.first_token = prompts, prompt_tokens, first_token
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.min_tokens, self.max_repetition = min_tokens, max_repetition
        self.batch_size, self.cache = batch_size, cache
        counts = {"prompt_tokens": prompt_tokens, "min_tokens": min_tokens, "batch_size": batch_size, "top_k": top_k}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"data.source.{name} must be at least 1, got {value}")
        for name, value, most in (("temperature", temperature, float("inf")), ("top_p", top_p, 1.0)):
            if value is not None and not (0 < value <= most and value < float("inf")):
                raise ValueError(f"data.source.{name} must be above 0{' and at most 1' * (most == 1)}, got {value}")
        if not 0 <= max_repetition <= 1:
            raise ValueError(f"data.source.max_repetition must be from 0 to 1, got {max_repetition}")
        if prompts is not None and prompts.is_written:
            raise ValueError(f"data.source.prompts needs text that people wrote, got {prompts}; name another source")

    def __str__(self) -> str:
        return "the text that the dense model writes"

    def identity(self) -> dict[str, Any]:
        """The options that decide the text, and the identity of the prompts; the model's is the run's own."""
        filters = {"min_tokens": self.min_tokens, "max_repetition": self.max_repetition}
        return {"source": "SelfGenerated", **self._decisive(), **filters}

    def _decisive(self) -> dict[str, Any]:
        """What decides the texts before they are filtered, beside model, length and seed."""
        if self.prompts is None:
            begin: dict[str, Any] = {"first_token": self.first_token}
        else:
            begin = {"prompts": self.prompts.identity(), "prompt_tokens": self.prompt_tokens}
        return begin | vars(self._sampling) | {"batch_size": self.batch_size}

    @property
    def _sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)

    def lack(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """See `TokenSource`: the token that texts are to begin with, or what the prompts need."""
        if self.prompts is not None:
            return self.prompts.lack(tokenizer)
        if self.first_token == "random" or tokenizer.bos_token_id is not None:
            return None
        return (
            f"data.source.first_token: bos needs a tokenizer with a token that begins a text, got "
            f"{tokenizer.name_or_path or 'one'} without; choose data.source.first_token: random"
        )

    def sequences(self, split: Split, draw: Draw) -> Tensor:
        """See `TokenSource`; what the cache lacks is written now.

        Raises:
            ValueError: If another split than train or all of it is asked for, or filters drop too much.
        """
        if split != "train" or draw.num_sequences is None:
            asked = "all of it" if split == "train" else f"a {split} split"
            raise ValueError(
                f"{self} has a train split of any length and no other, got a call for {asked}; give "
                f"data.num_sequences, and the text of validation and test as data.held_out"
            )
        require_tokenizer(self, draw.tokenizer)
        if draw.seq_len < max(self.min_tokens, self.prompt_tokens + 1 if self.prompts is not None else 2):
            raise ValueError(
                f"data.seq_len must be at least data.source.min_tokens and above data.source.prompt_tokens, got "
                f"{draw.seq_len}, {self.min_tokens} and {self.prompt_tokens}; a text is no longer than a sequence"
            )
        counts: Counter[str] = Counter()
        tokens = packed(self._kept(self._texts(draw), counts), draw.seq_len, draw.num_sequences, str(self))
        log.info(
            f"{draw.num_sequences} sequences of {self}: {counts['kept']} texts, {counts['short']} dropped as shorter "
            f"than {self.min_tokens} tokens, {counts['repetitive']} as repetitive"
        )
        return tokens

    def _kept(self, texts: Iterator[list[int]], counts: Counter[str]) -> Iterator[list[int]]:
        """The texts that pass the filters.

        Raises:
            ValueError: If hardly any do.
        """
        for ids in texts:
            if counts["short"] + counts["repetitive"] >= MOST * (counts["kept"] + self.batch_size):
                raise ValueError(
                    f"the filters of {self} must keep more than one text of {MOST}, got {counts['short']} of "
                    f"{sum(counts.values())} shorter than data.source.min_tokens {self.min_tokens} and "
                    f"{counts['repetitive']} with more repetition than data.source.max_repetition "
                    f"{self.max_repetition}; loosen them, or give data.source.prompts or another temperature"
                )
            fault = "short" if len(ids) < self.min_tokens else "repetitive" if self._repeats(ids) else "kept"
            counts[fault] += 1
            if fault == "kept":
                yield ids

    def _repeats(self, ids: list[int]) -> bool:
        return repetition(ids) > self.max_repetition

    def _texts(self, draw: Draw) -> Iterator[list[int]]:
        """The texts of all batches without end, from the cache or written now."""
        if draw.author is None:
            raise ValueError(
                f"{self} needs that model, got none: it is there in `recon prune`, `recon fit` and recon.recover, "
                f"which set TokenData.author"
            )
        directory, manifest = self._opened(draw, draw.author)
        index = 0
        while True:
            file = directory / f"{index:05d}.safetensors"
            with locked(directory / ".lock"):  # of two runs that need a batch, one writes it
                if not manifest.is_intact(file):
                    log.info(f"the dense model writes texts {index * self.batch_size} and on, {file}")
                    ids, lengths = draw.author.write(
                        self._prompts(draw, index), draw.seq_len, self._sampling, derived_seed(draw.seed, 1, index)
                    )
                    with manifest.writing(file) as temporary:
                        save_file({"ids": ids, "lengths": lengths}, temporary)
            batch = load_file(file)
            for ids, length in zip(batch["ids"].tolist(), batch["lengths"].tolist(), strict=True):
                yield ids[:length]
            index += 1

    def _opened(self, draw: Draw, author: Author) -> tuple[Path, Manifest]:
        """The directory of these texts within the cache, made if it is missing, and the records of its files.

        Raises:
            ValueError: If it cannot be written.
        """
        identity = {
            "author": author.identity(),
            "vocabulary": digest(draw.tokenizer.get_vocab()),
            **self._decisive(),
            "seq_len": draw.seq_len,
            "seed": draw.seed,
        }
        key = digest(identity)
        directory = Path(self.cache).expanduser() / key[:16]
        manifest = Manifest(directory)
        try:
            with locked(directory / ".lock"):
                if (held := manifest.read()) is None or held.identity != key:
                    manifest.begin(key)
                    write_json(directory / "identity.json", identity, manifest.writing)
        except OSError as error:
            raise ValueError(
                f"data.source.cache needs a directory that can be made and written, got {self.cache} ({error}); name "
                f"another one"
            ) from error
        return directory, manifest

    def _prompts(self, draw: Draw, index: int) -> Int[Tensor, "batch prompt"]:
        """The beginnings of the texts of a batch."""
        seed = derived_seed(draw.seed, 0, index)
        if self.prompts is not None:
            return self.prompts.sequences("train", Draw(draw.tokenizer, self.prompt_tokens, self.batch_size, seed))
        if self.first_token == "bos":
            begin: Any = draw.tokenizer.bos_token_id
            return torch.full((self.batch_size, 1), begin)
        known = sorted({*draw.tokenizer.get_vocab().values()} - {*draw.tokenizer.all_special_ids})
        chosen = torch.randint(len(known), (self.batch_size, 1), generator=torch.Generator().manual_seed(seed))
        return torch.tensor(known)[chosen]


def repetition(ids: list[int]) -> float:
    """Share of the pieces of four tokens that have stood before in the same text, 0 to 1."""
    pieces = [tuple(ids[start : start + GRAM]) for start in range(len(ids) - GRAM + 1)]
    return 1 - len(set(pieces)) / len(pieces) if pieces else 0.0
