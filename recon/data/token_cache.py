"""Tokens on disk: a text is tokenised once, by several processes, for all runs and ranks that train on it.

The sequences lie in shards, each of about `CHARACTERS` characters of text, in a directory named by a digest of all
that decides them: the text, the tokenizer, `data.seq_len` and this module's format. A manifest has the sha256 of each
shard, so that a killed run goes on behind the whole shards, and a damaged one is written again.
"""

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recon.basics.digests import digest
from recon.basics.files import sweep, write_json
from recon.basics.locks import locked
from recon.basics.manifest import Manifest
from recon.basics.units import readable
from recon.data.checks import require_ids
from recon.data.shards import MappedSequences, extremes, num_rows, write_shard
from recon.data.sources import TextSource
from recon.data.tokens import at_a_time, batches_of, token_ids

log = logging.getLogger("recon")

FORMAT = "recon-tokens-1"
"""Changes with anything in this module that decides the sequences: their shards, their order."""

CHARACTERS = 2**24
"""Of a shard's text. A process that tokenises holds it once, and 1 B tokens make about 250 files."""

BYTES = 4
"""Of a token on disk."""


class TokenCache:
    """Sequences of the train split of a text, as many as anybody has asked for.

    Documents come in a fixed random order, or in their own where they are pieces of one text; within a shard they are
    joined and cut without gaps. A larger number of sequences has those of a smaller one as its first.

    Args:
        root: Directory of all caches.
        source: The text.
        tokenizer: Turns it into token ids.
        seq_len: Tokens per sequence.
    """

    def __init__(self, root: str, source: TextSource, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> None:
        self.root, self.source, self.tokenizer, self.seq_len = root, source, tokenizer, seq_len
        self.identity = {
            "format": FORMAT,
            "characters": CHARACTERS,
            "text": source.identity(),
            "separator": source.separator,
            "tokenizer": _digest(tokenizer),
            "end": tokenizer.eos_token_id,
            "seq_len": seq_len,
        }
        self._key = digest(self.identity)
        self.directory = Path(root).expanduser() / self._key[:16]
        self.manifest = Manifest(self.directory)

    def sequences(self, num: int, num_workers: int = 0) -> MappedSequences:
        """The first `num` sequences; what the cache lacks is tokenised now, by one process while others wait for it.

        Args:
            num: How many.
            num_workers: Processes that tokenise; 0 for a thread of this one.

        Raises:
            ValueError: If the text or the disk is too small, or the directory cannot be written.
        """
        self._begin()
        files, held = self._held(num)
        if held < num:
            with locked(self.directory / ".lock"):
                files, held = self._held(num)
                if held < num:
                    self._require_room(num - held, num_workers)
                    self._fill(num, num_workers)
                    files, held = self._held(num)
        return MappedSequences(files, num)

    def require_embeddings(self, sequences: MappedSequences, model: PreTrainedModel) -> None:
        """As `recon.data.checks.require_embeddings`, for all files of `sequences`."""
        for file in filter(num_rows, sequences.files):
            require_ids(*extremes(file), model, self.source.origin("train"))

    def _file(self, index: int) -> Path:
        return self.directory / f"{index:05d}.arrow"

    def _held(self, num: int) -> tuple[list[Path], int]:
        """The first whole shards, with `num` sequences if there are as many, and the number of theirs."""
        content = self.manifest.read()
        files: list[Path] = []
        held = 0
        if content is not None and content.identity == self._key:
            while held < num and self.manifest.is_intact(file := self._file(len(files))):
                files.append(file)
                held += num_rows(file)
        return files, held

    def _begin(self) -> None:
        try:
            with locked(self.directory / ".lock"):
                if (content := self.manifest.read()) is None or content.identity != self._key:
                    self.manifest.begin(self._key)
                    write_json(self.directory / "identity.json", self.identity, self.manifest.writing)
                sweep(self.directory)
        except OSError as error:
            raise ValueError(
                f"data.cache needs a directory that can be made and written, got {self.root} ({error}); name "
                f"another one"
            ) from error

    def _require_room(self, num: int, num_workers: int) -> None:
        # The last shard is whole, and each process may have one more under way; few tokens have less than a character.
        surplus = (1 + max(1, num_workers)) * CHARACTERS
        needed, free = (num * self.seq_len + surplus) * BYTES, shutil.disk_usage(self.directory).free
        if free < needed:
            raise ValueError(
                f"data.max_tokens needs room in data.cache, {readable(needed)} more, got {readable(free)} free in "
                f"{self.directory}; free space, name a data.cache on another disk, or ask for fewer tokens"
            )

    def _fill(self, num: int, num_workers: int) -> None:
        """Write the shards that are missing until there are `num` sequences.

        Raises:
            ValueError: If the text ends before.
        """
        log.info(f"tokenise {self.source.origin('train')} into {self.directory}, by {max(1, num_workers)} processes")
        held, done = 0, 0
        pending: deque[Future[int]] = deque()
        pool = self._pool(num_workers)
        try:
            for index, batches in enumerate(self._chunks()):
                file = self._file(index)
                if self.manifest.is_intact(file):
                    held += num_rows(file)
                else:
                    pending.append(pool.submit(_write, self.manifest, file, self.seq_len, batches))
                while len(pending) > max(1, num_workers) or (pending and pending[0].done()):
                    held += pending.popleft().result()
                if (held * self.seq_len) // 100_000_000 > done:
                    done = (held * self.seq_len) // 100_000_000
                    log.info(f"{held * self.seq_len:,} of {num * self.seq_len:,} tokens")
                if held >= num:
                    break
            held += sum(future.result() for future in pending)
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"a process that tokenises was killed, perhaps for its memory; with data.num_workers {num_workers} "
                f"each has about 1 GB; give fewer, the same command goes on from there"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
        if held < num:
            raise ValueError(
                f"data.max_tokens needs {num * self.seq_len} tokens in sequences of {self.seq_len}, "
                f"{self.source.origin('train')} holds {held * self.seq_len}; ask for fewer, give more text, or "
                f"train on the same ones for more model.epochs"
            )

    def _pool(self, num_workers: int) -> Executor:
        if num_workers == 0:
            return ThreadPoolExecutor(1, initializer=_use, initargs=(self.tokenizer, self.source.separator))
        # A child that was forked must not use the threads of its parent's tokenizers, which warn if nobody says so.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        return ProcessPoolExecutor(
            num_workers,
            multiprocessing.get_context(),
            _use_alone,
            (self.tokenizer, self.source.separator),
        )

    def _chunks(self) -> Iterator[list[list[str]]]:
        """The text of each shard, in the batches that are tokenised at a time."""
        separator, documents = self.source.separator, self.source.documents("train")
        if separator is None:
            documents = documents.shuffle(seed=0)  # not the run's: all seeds share the tokens
        chunk: list[list[str]] = []
        size = 0
        for texts in batches_of(documents, at_a_time(separator), self.source.origin("train")):
            chunk.append(texts)
            size += sum(len(text) for text in texts)
            if size >= CHARACTERS:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk


def _digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Sha256 of all that decides the ids of a text."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    text = json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    return hashlib.sha256(f"{type(tokenizer).__name__} {text}".encode()).hexdigest()


_used: dict[str, Any] = {}
"""Tokenizer and separator of a worker, which would else be sent with each shard."""


def _use(tokenizer: PreTrainedTokenizerBase, separator: str | None) -> None:
    _used.update(tokenizer=tokenizer, separator=separator)


def _use_alone(tokenizer: PreTrainedTokenizerBase, separator: str | None) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _use(tokenizer, separator)


def _end_with_parent() -> None:
    """End this process with its parent, however that ends: a worker would wait for ever, and keep the lock."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _write(manifest: Manifest, file: Path, seq_len: int, batches: list[list[str]]) -> int:
    """Tokenise the text of a shard into its file; the number of its sequences."""
    with manifest.writing(file) as temporary:
        return write_shard(temporary, token_ids(iter(batches), _used["tokenizer"], _used["separator"]), seq_len)
