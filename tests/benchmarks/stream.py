"""Full retraining on a stream of tokens: memory, tokens per second, the position after a resume, shares of processes.

Documents of random words are tokenised into the cache, and an epoch of the training loader is read: by one process,
by its workers, from the middle, and by two connected processes. Then full retraining takes steps on it.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from transformers import AutoTokenizer

from recon.data import SavedDataset, TokenData
from recon.models.loading import ModelSource

SEQ_LEN = 1024
WORDS_A_DOCUMENT = 500


def documents(path: Path, num_words: int) -> None:
    """Save documents of random words of a vocabulary of 20,000, some short, some long."""
    from datasets import Dataset

    def rows() -> Iterator[dict[str, str]]:
        chooser = np.random.default_rng(0)
        letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
        words = np.array(["".join(chooser.choice(letters, chooser.integers(2, 9))) for _ in range(20_000)])
        left = num_words
        while left > 0:
            length = int(chooser.integers(1, 2 * WORDS_A_DOCUMENT))
            left -= length
            yield {"text": " ".join(words[chooser.integers(0, len(words), length)])}

    cache = str(path.with_name("generated"))
    Dataset.from_generator(rows, cache_dir=cache).save_to_disk(path)  # pyright: ignore[reportAttributeAccessIssue]


def data_of(directory: Path, max_tokens: int, num_workers: int) -> TokenData:
    """The data of the benchmark, with the tokenizer of the bundled model."""
    source = SavedDataset(str(directory / "documents"))
    data = TokenData(
        source,
        seq_len=SEQ_LEN,
        batch_size=8,
        max_tokens=max_tokens,
        num_workers=num_workers,
        cache=str(directory / "tokens"),
    )
    data.tokenizer = AutoTokenizer.from_pretrained(directory / "tokenizer")
    return data


def resident() -> dict[str, int]:
    """Bytes of this process in memory now: its own (`RssAnon`) and mapped files (`RssFile`)."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0][:-1]: 1024 * int(words[1]) for words in lines if words[0] in ("RssAnon:", "RssFile:")}


class Peak:
    """The largest resident bytes above those at the beginning of a block, looked at 20 times a second."""

    def __enter__(self) -> "Peak":
        self._begin, self.bytes, self._ended = resident(), dict.fromkeys(resident(), 0), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            now = resident()
            self.bytes = {name: max(held, now[name] - self._begin[name]) for name, held in self.bytes.items()}

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()


def digests(loader: Any) -> tuple[list[bytes], list[bytes], float]:
    """Read an epoch: digests of its batches and of its sequences, and the seconds until the last batch came."""
    batches, rows = [], []
    seconds, started = 0.0, time.perf_counter()
    for batch in loader:
        seconds += time.perf_counter() - started
        ids = batch["input_ids"].numpy()
        batches.append(hashlib.sha256(ids).digest())
        rows += [hashlib.sha256(row).digest() for row in ids]
        started = time.perf_counter()
    return batches, rows, seconds


def share_of_rank(directory: Path, max_tokens: int) -> list[bytes]:
    """Digests of the sequences that this one of several connected processes trains on in an epoch."""
    dist.init_process_group("gloo")
    try:
        return digests(data_of(directory, max_tokens, 0).train_dataloader())[1]
    finally:
        dist.destroy_process_group()


def fit(directory: Path, max_tokens: int, max_steps: int) -> dict[str, Any]:
    """Full retraining of the bundled model's shape in a process of its own: its peak resident bytes and seconds."""
    run = directory / f"run-{max_tokens}"
    sizes = {"num_sequences": 8, "seq_len": SEQ_LEN, "num_validation": 2, "num_test": 2, "batch_size": 1}
    shape = {"model_type": "llama", "vocab_size": 2048, "hidden_size": 32, "intermediate_size": 64}
    shape |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": SEQ_LEN}
    command = [
        *(sys.executable, "-m", "recon", "fit", "-c", "scopes/full", "-c", "criteria/magnitude"),
        *("--model.name", "random", f"--model.shape={json.dumps(shape)}", "--model.tokenizer"),
        *(str(directory / "tokenizer"), "--trainer.accelerator", "cpu", "--summary", "false", "--baselines", "false"),
        *("--data.source", "SavedDataset", "--data.source.path", str(directory / "documents")),
        *(part for name, value in sizes.items() for part in (f"--data.{name}", str(value))),
        *("--data.max_tokens", str(max_tokens), "--data.cache", str(directory / "tokens"), "--model.epochs", "1"),
        *("--trainer.max_steps", str(max_steps), "--trainer.logger", "false", "--drift", "false"),
        *("--run_dir", str(run)),
    ]
    with (directory / "fit.log").open("a") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError((directory / "fit.log").read_text())
    report = json.loads((run / "report.json").read_text())
    return {"peak": 1024 * usage.ru_maxrss, "seconds": report["seconds"], "train_tokens": report["train_tokens"]}


def measure(directory: Path, quick: bool = False, fits: bool = True) -> dict[str, Any]:
    """Measure the cache and the loader, and what full retraining takes with few tokens and with all.

    Args:
        directory: Where all goes.
        quick: A few thousand tokens in place of 50 M.
        fits: Also train.

    Raises:
        AssertionError: If a resumed loader has other batches, or two processes do not share all sequences.
    """
    from tests.support.processes import in_processes

    max_tokens = SEQ_LEN * (64 if quick else 48_832)  # 50,003,968
    documents(directory / "documents", max_tokens // 2)  # a random word is several tokens
    ModelSource("bundled").load_tokenizer().save_pretrained(directory / "tokenizer")
    started = time.perf_counter()
    with Peak() as tokenising:
        data_of(directory, max_tokens, 0 if quick else 2).stream()
    result: dict[str, Any] = {"tokens": max_tokens, "tokenising": max_tokens / (time.perf_counter() - started)}
    result["tokenising_peak"] = tokenising.bytes
    with Peak() as loading:
        batches, rows, seconds = digests(data_of(directory, max_tokens, 0).train_dataloader())
    result |= {"loading": max_tokens / seconds, "loading_peak": loading.bytes}
    if not quick:
        result["loading_workers"] = max_tokens / digests(data_of(directory, max_tokens, 2).train_dataloader())[2]
    resumed: Any = data_of(directory, max_tokens, 0).train_dataloader()
    resumed.load_state_dict({"given": len(batches) * 2 // 3})
    started = time.perf_counter()
    next(iter(resumed))
    result["resume_seconds"] = time.perf_counter() - started
    resumed.load_state_dict({"given": len(batches) * 2 // 3})
    assert digests(resumed)[0] == batches[len(batches) * 2 // 3 :], "a resumed loader has other batches"
    shares = in_processes(share_of_rank, directory, max_tokens)
    assert sorted(shares[0] + shares[1]) == sorted(rows), "two processes do not share all sequences"
    assert len(shares[0]) == len(shares[1]) == len(rows) // 2
    if fits:
        steps = 4 if quick else 500
        result["few"], result["all"] = (fit(directory, tokens, steps) for tokens in (8 * SEQ_LEN, max_tokens))
    return result


def table(result: dict[str, Any]) -> str:
    """The result as markdown."""
    rows = [
        ("tokens", f"{result['tokens']:,}"),
        ("tokenised per second", f"{result['tokenising']:,.0f}"),
        ("memory of the process that has them tokenised", _memory(result["tokenising_peak"])),
        ("loaded per second, without workers", f"{result['loading']:,.0f}"),
        ("memory of an epoch of loading", _memory(result["loading_peak"])),
        ("first batch after a resume at two thirds, s", f"{result['resume_seconds']:.3f}"),
    ]
    if "loading_workers" in result:
        rows.append(("loaded per second, two workers", f"{result['loading_workers']:,.0f}"))
    if "all" in result:
        few, whole = result["few"], result["all"]
        rows.append(
            ("peak of `recon fit` above that on 8 sequences, MiB", f"{(whole['peak'] - few['peak']) / 2**20:.0f}")
        )
        rows.append(("trained tokens, seconds", f"{whole['train_tokens']:,}, {whole['seconds']:.0f}"))
    return "\n".join(["| measurement | |", "|---|--:|", *(f"| {name} | {value} |" for name, value in rows)])


def _memory(peak: dict[str, int]) -> str:
    return f"{peak['RssAnon'] / 2**20:.0f} MiB of its own, {peak['RssFile'] / 2**20:.0f} MiB of mapped files"
