"""A source of token sequences: what every text of a run is asked for, whether people, a chat or the model wrote it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor
from transformers import PreTrainedTokenizerBase

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Sampling:
    """How a model chooses its next token.

    Args:
        temperature: Divides the logits.
        top_k: Choose among this many likeliest tokens; among all if null.
        top_p: Choose among the likeliest tokens that together have this probability; among all if null.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


@runtime_checkable
class Author(Protocol):
    """The dense model of a run, for sources whose text it writes."""

    def identity(self) -> Any:
        """What decides the text beside prompts and options, as JSON: weights, tokenizer, versions."""
        ...

    def write(self, prompts: Tensor, num_tokens: int, sampling: Sampling, seed: int) -> tuple[Tensor, Tensor]:
        """Continue prompts until each has `num_tokens` tokens, or the model has ended it.

        Args:
            prompts: Token ids int64[num, length], all of one length.
            num_tokens: Of a text, its prompt included.
            sampling: How the next token is chosen.
            seed: Of the choices.

        Returns:
            Token ids int32[num, num_tokens] on the host, and int32[num], how many of each row are the text's: the end
            token, if there is one, is the last of them.
        """
        ...


@dataclass(frozen=True)
class Draw:
    """Which sequences a source is asked for.

    Args:
        tokenizer: Turns text into token ids.
        seq_len: Tokens per sequence.
        num_sequences: How many; None for all that the split holds, in its own order.
        seed: Decides the choice.
        author: Writes text where the source is not written yet; None if there is no dense model at hand.
    """

    tokenizer: PreTrainedTokenizerBase
    seq_len: int
    num_sequences: int | None
    seed: int
    author: Author | None = None


class TokenSource(ABC):
    """Token sequences of a train, a validation and a test split.

    Attributes:
        is_written: Whether the dense model of the run writes the text, which then serves calibration alone.
        is_particular: Whether there are tokenizers that `lack` refuses.
        is_joined: Whether sequences are cut out of joined documents, so that they can be cut into a cache of tokens.
    """

    is_written: bool = False
    is_particular: bool = False
    is_joined: bool = False

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Identity of the text for fingerprints, found without reading all of it."""

    @abstractmethod
    def sequences(self, split: Split, draw: Draw) -> Tensor:
        """Token ids int64[num_sequences, seq_len] of `split`, without padding.

        Raises:
            ValueError: If the split cannot be read, or holds too few tokens.
        """

    def lack(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """What `tokenizer` lacks to be of use to this source, with the cure; None here, for any will do."""
        return None

    def origin(self, split: Split) -> str:
        """What messages call `split`."""
        return f"the {split} split of {self}"

    def cut(self, split: Split) -> str:
        """How `split` was cut by position out of one text that is the train split's, too; empty if it was not."""
        return ""
