"""Conversations as token sequences, through the chat template of the model's tokenizer."""

import json
import logging
from collections.abc import Iterator
from textwrap import shorten
from typing import Any

from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recon.data.checks import require_tokenizer
from recon.data.packing import packed
from recon.data.reading import Documents, require_column
from recon.data.sources import HubDataset, TextSource
from recon.data.text_files import TextFiles
from recon.data.token_source import Draw, Split
from recon.data.tokens import batches_of

log = logging.getLogger("recon")


class Chat(TextSource):
    """Conversations of one or several turns, in the form that an instruction model was trained on.

    A row holds one conversation, a list of messages such as `{"role": "user", "content": "..."}`. The chat template of
    the tokenizer turns each conversation into tokens. A sequence begins where a conversation begins, so with the begin
    of the template, never within a turn. Conversations follow each other until the sequence is full. The last one is
    cut at the sequence's end and its rest is dropped: of a conversation longer than `data.seq_len`, the first
    `data.seq_len` tokens are used. A log line tells how many were cut. Splits that are not given are carved out of
    train by a hash of each conversation.

    Args:
        paths: Local jsonl, json or parquet files of the train split, and of splits for which none are given.
        validation_paths: Files of the validation split; carved out of `paths` if empty.
        test_paths: Files of the test split; carved out of `paths` if empty.
        path: Name of a data set on the hub, in place of files, for example `HuggingFaceH4/ultrachat_200k`.
        name: Configuration of the hub's data set.
        revision: Commit, tag or branch of the hub's data set.
        splits: The hub's split for each of ours, for example `{train: train_sft, test: test_sft}`.
        streaming: Read the hub's data set on demand.
        column: The column that holds the messages.
    """

    unit = "conversation"
    is_particular = True

    def __init__(
        self,
        paths: list[str] | None = None,
        validation_paths: list[str] | None = None,
        test_paths: list[str] | None = None,
        path: str | None = None,
        name: str | None = None,
        revision: str | None = None,
        splits: dict[str, str] | None = None,
        streaming: bool = False,
        column: str = "messages",
    ) -> None:
        if bool(paths) == bool(path):
            raise ValueError(
                f"data.source needs paths of files with conversations, or path, a data set on the hub, and not both, "
                f"got paths {paths} and path {path}"
            )
        self.paths, self.validation_paths, self.test_paths = paths, validation_paths, test_paths
        self.path, self.name, self.revision = path, name, revision
        self.splits, self.streaming, self.column = splits, streaming, column
        self._rows: TextFiles | HubDataset = (
            HubDataset(path, name, revision, column, splits, streaming)
            if path
            else TextFiles(paths or [], validation_paths, test_paths, column)
        )

    def __str__(self) -> str:
        return f"the conversations of {self._rows}"

    def has(self, split: Split) -> bool:
        """Whether there are conversations of `split`."""
        return self._rows.has(split)

    def identity(self) -> dict[str, str]:
        """That of the files or of the hub's data set."""
        return self._rows.identity() | {"source": "Chat"}

    def load(self, split: Split) -> Documents:
        """The messages of each conversation as JSON, in a column `text`.

        Raises:
            ValueError: If there is no such column.
        """
        rows, column = self._rows.rows(split), self.column
        require_column(rows, column, str(self))
        return rows.select_columns(column).map(lambda row: {"text": json.dumps(row[column])}, remove_columns=column)

    def lack(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """See `TokenSource`: a chat template."""
        if tokenizer.chat_template:
            return None
        return (
            f"data.source Chat needs a tokenizer with a chat template, got {tokenizer.name_or_path or 'one'} without, "
            f"like those of base models; give the tokenizer of the instruction model as model.tokenizer, put its "
            f"chat_template.jinja into the model's directory, or take another data.source, such as TextFiles"
        )

    def sequences(self, split: Split, draw: Draw) -> Tensor:
        """See `TokenSource`; conversations are drawn without replacement."""
        require_tokenizer(self, draw.tokenizer)
        rows = self.documents(split)
        if draw.num_sequences is not None:
            rows = rows.shuffle(seed=draw.seed)
        longer: list[int] = []
        tokens = packed(
            self._conversations(rows, split, draw, longer), draw.seq_len, draw.num_sequences, self.origin(split)
        )
        if longer:
            log.info(
                f"{len(longer)} conversations of {self.origin(split)} are longer than a sequence ({draw.seq_len} "
                f"tokens), up to {max(longer)}; they are cut there"
            )
        return tokens

    def _conversations(self, rows: Documents, split: Split, draw: Draw, longer: list[int]) -> Iterator[list[int]]:
        """Token ids of each conversation; the lengths of those longer than a sequence are added to `longer`."""
        texts = (text for texts in batches_of(rows, 16, self.origin(split)) for text in texts)
        for text in texts:
            messages = _messages(text, self.origin(split))
            try:
                found: Any = draw.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
            except (TemplateError, ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{self.origin(split)} needs conversations that the tokenizer's chat template takes, got "
                    f"{shorten(text, 200)}: {shorten(f'{error}', 300)}; correct or delete it"
                ) from error
            if len(found["input_ids"]) > draw.seq_len:
                longer.append(len(found["input_ids"]))
            yield found["input_ids"]


def _messages(text: str, origin: str) -> list[dict[str, Any]]:
    """The messages of a conversation, without the fields that other rows have and these lack.

    Raises:
        ValueError: If they are no list of messages with a role and a text.
    """
    given = json.loads(text)
    is_list = isinstance(given, list) and len(given) > 0
    if not is_list or not all(isinstance(one, dict) and {"role", "content"} <= one.keys() for one in given):
        raise ValueError(
            f"{origin} needs lists of messages with role and content, such as "
            f'[{{"role": "user", "content": "words"}}], got {shorten(text, 200)}; convert the rows, or name another '
            f"data.source.column"
        )
    return [{name: value for name, value in one.items() if value is not None} for one in given]
