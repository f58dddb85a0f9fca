"""Tokens on disk: the same sequences whoever tokenises them and whenever, read once each, from any position."""

import json
import multiprocessing
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DistributedSampler
from transformers import PreTrainedTokenizerFast

from recon.cli import main
from recon.data import Chat, Mixture, StandardLibrary, TextFiles, TokenData, shards, token_cache
from recon.data.loader import ResumableLoader, SeededOrder
from recon.data.shards import MappedSequences, write_shard
from recon.data.texts import Texts
from recon.data.token_cache import TokenCache
from recon.scopes.full import FullRetraining
from tests.support.families import VOCABULARY, tiny

SEQ_LEN, END = 8, 2
DOCUMENTS = [" ".join(f"w{3 + (7 * row + step) % 50}" for step in range(5 + row % 13)) for row in range(300)]
"""Documents of 5 to 17 tokens."""


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(token_cache, "CHARACTERS", 2000)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    words = ["<unk>", "<other>", "<end>", *(f"w{index}" for index in range(3, VOCABULARY))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="<unk>")


def cache_in(directory: Path, tokenizer: Any, documents: Sequence[str] = DOCUMENTS, seq_len: int = SEQ_LEN):
    return TokenCache(str(directory), Texts(documents, DOCUMENTS[:1], DOCUMENTS[:1]), tokenizer, seq_len)


def tokens_of(sequences: MappedSequences) -> torch.Tensor:
    return torch.stack([row["input_ids"] for row in sequences.__getitems__(list(range(len(sequences))))])


def data_in(directory: Path, tokenizer: Any, **options: Any) -> TokenData:
    given = {"seq_len": SEQ_LEN, "batch_size": 4, "max_tokens": 100 * SEQ_LEN, "cache": str(directory / "tokens")}
    data = TokenData(Texts(DOCUMENTS, DOCUMENTS[:9], DOCUMENTS[:9]), **{**given, **options})
    data.tokenizer = tokenizer
    return data


def batches_of(loader: Any) -> list[torch.Tensor]:
    return [batch["input_ids"] for batch in loader]


def expected() -> torch.Tensor:
    """The sequences of all documents, by the slow and obvious way."""
    rows: list[list[int]] = []
    batches: Any = Dataset.from_dict({"text": DOCUMENTS}).shuffle(seed=0).iter(16)
    chunk: list[str] = []
    for texts in [*(batch["text"] for batch in batches), None]:
        chunk += texts or []
        if texts is None or sum(map(len, chunk)) >= 2000:
            ids = [int(word[1:]) for text in chunk for word in f"{text} w{END}".split()]
            rows += [ids[begin : begin + SEQ_LEN] for begin in range(0, len(ids) - SEQ_LEN + 1, SEQ_LEN)]
            chunk = []
    return torch.tensor(rows)


def test_documents_are_joined_and_cut(tmp_path: Path, tokenizer) -> None:
    whole = expected()
    sequences = cache_in(tmp_path, tokenizer).sequences(len(whole))
    assert len(sequences.files) > 3
    assert torch.equal(tokens_of(sequences), whole)
    assert sequences[5]["input_ids"].dtype == torch.int64
    text = Counter(word for document in DOCUMENTS for word in document.split())
    kept = Counter(f"w{int(one)}" for one in whole.flatten() if one != END)
    assert all(text[word] - kept[word] >= 0 for word in text)
    assert sum((text - kept).values()) < SEQ_LEN * len(sequences.files)  # less than a sequence a shard


def test_a_record_batch_ends_where_a_sequence_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ROWS", 2)
    assert write_shard(tmp_path / "shard", [range(5), range(5, 19), range(19, 30)], 4) == 7
    tokens = tokens_of(MappedSequences([tmp_path / "shard"], 7))
    assert tokens.flatten().tolist() == list(range(28))
    assert shards.extremes(tmp_path / "shard") == (0, 27)


def test_fewer_are_the_first_of_more_and_nothing_is_tokenised_twice(tmp_path: Path, tokenizer, monkeypatch) -> None:
    few = cache_in(tmp_path, tokenizer).sequences(20)
    before = {file: file.stat().st_mtime_ns for file in few.files}
    more = cache_in(tmp_path, tokenizer).sequences(200)
    assert {file: file.stat().st_mtime_ns for file in few.files} == before
    assert torch.equal(tokens_of(few), tokens_of(more)[:20])
    monkeypatch.setattr(TokenCache, "_chunks", lambda self: pytest.fail("documents were read"))
    assert torch.equal(tokens_of(cache_in(tmp_path, tokenizer).sequences(200)), tokens_of(more))


def test_processes_write_the_same_bytes(tmp_path: Path, tokenizer) -> None:
    one, two = (cache_in(tmp_path / f"{num}", tokenizer).sequences(300, num) for num in (0, 2))
    assert [file.read_bytes() for file in one.files] == [file.read_bytes() for file in two.files]


def begin_to_tokenise(cache: TokenCache, to: Any) -> None:
    with cache._pool(1) as pool:  # named: a pool that nothing names is collected, and ends its workers
        to.send(pool.submit(os.getpid).result())
        time.sleep(60)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and processes that fork")
def test_a_process_that_tokenises_ends_with_its_parent(tmp_path: Path, tokenizer) -> None:
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    parent = fork.Process(target=begin_to_tokenise, args=(cache_in(tmp_path, tokenizer), there))
    parent.start()
    assert here.poll(30)
    worker = here.recv()
    assert is_alive(worker)
    parent.kill()
    parent.join()
    end = time.monotonic() + 10
    while is_alive(worker) and time.monotonic() < end:
        time.sleep(0.01)
    assert not is_alive(worker)


def test_a_killed_run_goes_on_and_a_damaged_shard_is_written_again(tmp_path: Path, tokenizer, monkeypatch) -> None:
    straight = cache_in(tmp_path / "straight", tokenizer).sequences(300)
    written: list[Path] = []

    def killed(path: Path, *args: Any) -> int:
        if len(written) == 2:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path)
        return write_shard(path, *args)

    cache = cache_in(tmp_path / "killed", tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            cache.sequences(300)
    assert len(list(cache.directory.glob("*.arrow"))) == 2
    first, second = sorted(cache.directory.glob("*.arrow"))
    second.write_bytes(second.read_bytes()[:-3] + b"xyz")
    kept = first.stat().st_mtime_ns
    assert torch.equal(tokens_of(cache_in(tmp_path / "killed", tokenizer).sequences(300)), tokens_of(straight))
    assert first.stat().st_mtime_ns == kept


def test_a_cache_is_of_its_text_tokenizer_and_length(tmp_path: Path, tokenizer) -> None:
    backend = tokenizer.backend_tokenizer
    other = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<other>", unk_token="<unk>")
    caches = [
        cache_in(tmp_path, tokenizer),
        cache_in(tmp_path, tokenizer, DOCUMENTS[:-1]),
        cache_in(tmp_path, tokenizer, seq_len=9),
        cache_in(tmp_path, other),
    ]
    assert len({cache.directory for cache in caches}) == 4
    assert cache_in(tmp_path, tokenizer).directory == caches[0].directory


def test_a_directory_of_another_version_is_begun_anew(tmp_path: Path, tokenizer) -> None:
    cache = cache_in(tmp_path, tokenizer)
    tokens = tokens_of(cache.sequences(50))
    for file in cache.directory.glob("*.arrow"):
        with cache.manifest.writing(file) as temporary:
            write_shard(temporary, [range(4000)], SEQ_LEN)
    content = json.loads(cache.manifest.file.read_text())
    cache.manifest.file.write_text(json.dumps({**content, "identity": "of another version"}))
    assert torch.equal(tokens_of(cache_in(tmp_path, tokenizer).sequences(50)), tokens)
    cache.manifest.file.write_text("half")
    with pytest.raises(ValueError, match=rf"{cache.directory}.*damaged.*or delete"):
        cache_in(tmp_path, tokenizer).sequences(50)


def test_too_little_text_disk_or_right(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    num = len(expected())
    with pytest.raises(ValueError, match=rf"needs 72000 tokens.*train split.*holds {num * SEQ_LEN}; ask for fewer"):
        cache_in(tmp_path, tokenizer).sequences(9000)
    assert torch.equal(tokens_of(cache_in(tmp_path, tokenizer).sequences(num)), expected())
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"data\.cache needs a directory .*file.*name another one"):
        cache_in(tmp_path / "file", tokenizer).sequences(1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(ValueError, match=r"room in data\.cache, 30\.5 MiB more, got 1\.0 MiB free"):
        cache_in(tmp_path / "full", tokenizer).sequences(10**6)
    monkeypatch.setattr(token_cache, "CHARACTERS", 2**20)
    with pytest.raises(
        ValueError, match=r"42\.5 MiB more"
    ):  # 4 MiB of the last shard, and of one under way in each process
        cache_in(tmp_path / "full", tokenizer).sequences(10**6, 2)


def test_ids_without_an_embedding_are_refused(tmp_path: Path, tokenizer) -> None:
    data = data_in(tmp_path, tokenizer)
    data.require_stream(tiny("llama"))
    data.require_stream(tiny("llama", vocab_size=53))
    with pytest.raises(ValueError, match=r"token ids from 0 to 51, .* got 2 to 52; give the model's own tokenizer"):
        data.require_stream(tiny("llama", vocab_size=52))


def test_sources_without_joined_documents_are_refused(tmp_path: Path, tokenizer) -> None:
    files = tmp_path / "chat.jsonl"
    files.write_text("{}")
    for source in (Chat([str(files)]), Mixture([StandardLibrary(), TextFiles([str(files)])])):
        data = TokenData(source, seq_len=SEQ_LEN, max_tokens=SEQ_LEN)
        data.tokenizer = tokenizer
        with pytest.raises(ValueError, match=r"data\.max_tokens needs a source of documents .* leave it out"):
            data.stream()
    with pytest.raises(ValueError, match=r"max_tokens must be at least data\.seq_len, 8, one sequence.*got 7"):
        TokenData(seq_len=SEQ_LEN, max_tokens=7)
    with pytest.raises(ValueError, match=r"num_workers must be from 0 to 1024, got -1"):
        TokenData(num_workers=-1)


@pytest.mark.parametrize(("num", "processes"), [(10, 1), (10, 2), (11, 2), (11, 4), (2, 5)])
def test_the_order_is_that_of_torch(num: int, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recon.data.loader.PIECE", 3)
    seen: list[int] = []
    for rank in range(processes):
        ours, theirs = (
            kind(range(num), processes, rank, seed=5)  # pyright: ignore[reportArgumentType]
            for kind in (SeededOrder, DistributedSampler)
        )
        for epoch in (0, 1):
            ours.set_epoch(epoch)
            theirs.set_epoch(epoch)
            assert list(ours) == list(theirs)
        ours.begin = 1  # pyright: ignore[reportAttributeAccessIssue]
        assert list(ours) == list(theirs)[1:]
        assert list(ours) == list(theirs)  # of the next epoch only
        seen += ours
    assert set(seen) == set(range(num))
    assert max(Counter(seen).values()) == (1 if num % processes == 0 else -(-len(seen) // num))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_goes_on_where_it_was_without_reading_what_was_before(tmp_path, tokenizer, num_workers, monkeypatch):
    data = data_in(tmp_path, tokenizer, num_workers=num_workers)
    loader: Any = data.train_dataloader()
    loader.sampler.set_epoch(1)
    whole = batches_of(loader)
    assert len(whole) == 25
    assert not torch.equal(torch.cat(whole), torch.cat(batches_of(data.train_dataloader())))  # of epoch 0
    begun: Any = data.train_dataloader()
    begun.sampler.set_epoch(1)
    first = list(islice(iter(begun), 9))
    assert torch.equal(first[8]["input_ids"], whole[8])
    resumed: Any = data.train_dataloader()
    resumed.sampler.set_epoch(1)
    resumed.load_state_dict(begun.state_dict())
    read: list[int] = []
    reading = MappedSequences.__getitems__
    monkeypatch.setattr(MappedSequences, "__getitems__", lambda self, rows: read.extend(rows) or reading(self, rows))
    rest = batches_of(resumed)
    assert torch.equal(torch.cat(rest), torch.cat(whole[9:]))
    assert num_workers or len(read) == 100 - 9 * 4
    assert len(batches_of(resumed)) == 25


def test_maps_are_renewed(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "READS", 10)
    sequences = cache_in(tmp_path, tokenizer).sequences(60)
    rows: list[Any] = []
    for index in range(0, 60, 4):
        sequences.__getitems__([index])
        rows.append(sequences._rows)
    assert len({id(one) for one in rows}) == 2
    assert torch.equal(tokens_of(sequences), expected()[:60])


def test_ranks_have_every_sequence_once(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_in(tmp_path, tokenizer)
    whole = sorted(tokens_of(data.stream()).tolist())
    shares = []
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        shares.append(torch.cat(batches_of(data.train_dataloader())).tolist())
    assert [len(share) for share in shares] == [50, 50]
    assert sorted(shares[0] + shares[1]) == whole


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> list[str]:
    """Full retraining of a tiny model on 20 sequences of a stream, with 3 for pruning."""
    root = tmp_path_factory.mktemp("stream")
    tiny("llama").save_pretrained(root / "dense")
    tokenizer.save_pretrained(root / "dense")
    Dataset.from_dict({"text": DOCUMENTS}).to_json(root / "text.jsonl")
    sizes = {"num_sequences": 3, "seq_len": SEQ_LEN, "num_validation": 2, "num_test": 2, "batch_size": 2}
    return [
        *("fit", "-c", "scopes/full", "--model.name", str(root / "dense"), "-c", "criteria/magnitude"),
        *("--data.source", "TextFiles", "--data.source.paths", f"[{root / 'text.jsonl'}]"),
        *(part for name, value in sizes.items() for part in (f"--data.{name}", str(value))),
        *("--data.max_tokens", "167", "--data.cache", str(root / "tokens"), "--trainer.accelerator", "cpu"),
        *("--summary", "false", "--baselines", "false", "--drift", "false", "--checkpoint_every_n_steps", "3"),
        *("--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--model.epochs", "2"),
    ]


def report_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text())


@pytest.mark.slow
def test_full_retraining_on_a_stream_goes_on_with_the_same_bits(command, tmp_path: Path, monkeypatch) -> None:
    assert main([*command, "--run_dir", str(tmp_path / "straight")]) == 0
    assert report_of(tmp_path / "straight")["train_tokens"] == 2 * 20 * SEQ_LEN
    given: list[int] = []
    batches = ResumableLoader.__iter__

    def stopping(self: Any) -> Iterator[Any]:
        for batch in batches(self):
            if isinstance(self.sampler, SeededOrder):
                given.append(self.given)
                if len(given) == 15:  # in the second epoch of ten batches
                    raise KeyboardInterrupt
            yield batch

    killed = [*command, "--run_dir", str(tmp_path / "killed"), "--data.num_workers", "0"]
    with monkeypatch.context() as patch:
        patch.setattr(ResumableLoader, "__iter__", stopping)
        with pytest.raises(BaseException):  # noqa: B017, PT011 (Lightning's own exit)
            assert main(killed) == 0
    assert main(killed) == 0
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("straight", "killed")]
    assert weights[0] == weights[1]
    assert report_of(tmp_path / "killed")["train_tokens"] == 2 * 20 * SEQ_LEN


@pytest.mark.slow
@pytest.mark.parametrize(("keep_best", "expected"), [("false", [3, 6]), ("true", [3, 6, 7])])
def test_validation_comes_every_few_steps_and_for_the_best_weights_after_the_last(
    keep_best: str, expected: list[int], command, tmp_path: Path, monkeypatch
) -> None:
    held_out: list[int] = []
    offered = FullRetraining.on_validation_end
    monkeypatch.setattr(
        FullRetraining, "on_validation_end", lambda self: held_out.append(self.global_step) or offered(self)
    )
    stop = ["--trainer.max_steps", "7", "--trainer.val_check_interval", "3", "--trainer.num_sanity_val_steps", "0"]
    assert main([*command, *stop, "--model.keep_best", keep_best, "--run_dir", str(tmp_path)]) == 0
    assert report_of(tmp_path)["train_tokens"] == 7 * 2 * SEQ_LEN
    assert held_out == expected


@pytest.mark.slow
def test_local_scopes_keep_their_calibration(command, tmp_path: Path, capsys) -> None:
    local = [part if part != "scopes/full" else "scopes/submodule" for part in command]
    assert main([*local, "--run_dir", str(tmp_path)]) == 2
    assert "data.max_tokens is for full retraining" in capsys.readouterr().err
