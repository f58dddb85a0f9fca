import csv
import json
import socket
from itertools import chain

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DistributedSampler
from transformers import PreTrainedTokenizerFast

from recon.cli.arguments import DEFAULT_DATA, plain_data
from recon.data import HubDataset, SavedDataset, StandardLibrary, TextFiles, TokenData, sources
from recon.data.tokens import sequences

WORDS = [f"w{index}" for index in range(200)]
END = len(WORDS)  # the id of the end-of-sequence token
TEXTS = [" ".join(WORDS[(7 * row + step) % 200] for step in range(10)) for row in range(120)]
"""120 documents of 10 tokens each, no two alike."""


@pytest.fixture(autouse=True)
def _cache_of_ones_own(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, so that texts and token ids can be read off each other."""
    vocabulary = {word: index for index, word in enumerate([*WORDS, "<end>", "<sep>", "<unk>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", bos_token="<unk>", pad_token="<unk>", unk_token="<unk>"
    )


def write(directory, suffix: str, texts=TEXTS, column="text", name="corpus") -> str:
    path = directory / f"{name}.{suffix}"
    rows = [{"id": index, column: text} for index, text in enumerate(texts)]
    if suffix in ("txt", "text"):
        path.write_text("\n\n".join(texts))
    elif suffix == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["id", column])
            writer.writeheader()
            writer.writerows(rows)
    else:
        Dataset.from_list(rows).to_parquet(str(path))
    return str(path)


def texts_of(source, split) -> list[str]:
    return [row["text"] for row in source.documents(split)]


def hub(monkeypatch, streaming=False, **options) -> HubDataset:
    """A hub data set served from memory; the calls that would have gone to the hub are in `.calls`."""
    calls = []

    def load_dataset(path, name=None, *, split, **rest):
        calls.append({"path": path, "name": name, "split": split, **rest})
        texts = TEXTS if split == "train" else [f"{split} w1"]
        rows = Dataset.from_dict({"text": texts, "url": ["x"] * len(texts)})
        return rows.to_iterable_dataset() if rest.get("streaming") else rows

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    source = HubDataset("owner/corpus", streaming=streaming, **options)
    source.calls = calls  # pyright: ignore[reportAttributeAccessIssue]
    return source


# --- sources -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_text(tmp_path, suffix):
    source = TextFiles([write(tmp_path, suffix)])
    assert texts_of(source, "train") == [text for text in TEXTS if sources.bucket(text) >= 10]
    assert texts_of(source, "validation") == [text for text in TEXTS if 5 <= sources.bucket(text) < 10]
    assert texts_of(source, "test") == [text for text in TEXTS if sources.bucket(text) < 5]


def test_saved_and_hub_data_sets_give_the_same_text_as_files(tmp_path, monkeypatch):
    files = TextFiles([write(tmp_path, "jsonl")])
    expected = {split: texts_of(files, split) for split in sources.SPLITS}
    Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    saved = SavedDataset(str(tmp_path / "saved"))
    assert {split: texts_of(saved, split) for split in sources.SPLITS} == expected
    for streaming in (False, True):
        remote = hub(monkeypatch, streaming, splits={"train": "train"})
        assert isinstance(remote.documents("train"), IterableDataset) == streaming
        assert {split: texts_of(remote, split) for split in sources.SPLITS} == expected


def test_carved_splits_are_disjoint_and_complete(tmp_path):
    source = TextFiles([write(tmp_path, "jsonl")])
    splits = [texts_of(source, split) for split in sources.SPLITS]
    assert sorted(chain(*splits)) == sorted(TEXTS)
    assert all(splits)
    assert splits == [texts_of(TextFiles([write(tmp_path, "jsonl")]), split) for split in sources.SPLITS]


def test_equal_documents_share_a_split(tmp_path):
    source = TextFiles([write(tmp_path, "jsonl", TEXTS + TEXTS)])
    splits = [set(texts_of(source, split)) for split in sources.SPLITS]
    assert sum(map(len, splits)) == len(set(TEXTS))


def test_a_document_stays_in_its_split_when_others_go(tmp_path):
    before, after = (
        TextFiles([write(tmp_path, "jsonl", texts, name=str(len(texts)))]) for texts in (TEXTS, TEXTS[::2])
    )
    for split in sources.SPLITS:
        assert texts_of(after, split) == [text for text in texts_of(before, split) if text in TEXTS[::2]]


def test_files_given_for_a_split_are_that_split(tmp_path):
    train, test = write(tmp_path, "jsonl", TEXTS[:100], name="a"), write(tmp_path, "jsonl", TEXTS[100:], name="b")
    source = TextFiles([train], test_paths=[test])
    assert texts_of(source, "test") == TEXTS[100:]
    assert sorted(texts_of(source, "train") + texts_of(source, "validation")) == sorted(TEXTS[:100])
    assert len(texts_of(source, "validation")) == sum(5 <= sources.bucket(text) < 10 for text in TEXTS[:100])
    assert texts_of(TextFiles([], test_paths=[test]), "test") == TEXTS[100:]
    with pytest.raises(ValueError, match=r"neither a train split nor a train split"):
        TextFiles([], test_paths=[test]).documents("train")


def test_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "txt")
    assert len(texts_of(TextFiles(["~/corpus.txt"]), "train")) > 90


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_another_column(tmp_path, suffix):
    source = TextFiles([write(tmp_path, suffix, column="body")], column="body")
    assert len(texts_of(source, "train")) == sum(sources.bucket(text) >= 10 for text in TEXTS)
    assert source.documents("train").column_names == ["text"]


def test_words_that_pandas_takes_for_missing_are_text(tmp_path):
    texts = ["NA", "None", "null", "nan", *TEXTS]
    assert {"NA", "None", "null", "nan"} <= {
        text for split in sources.SPLITS for text in texts_of(TextFiles([write(tmp_path, "csv", texts)]), split)
    }


def test_rows_without_text_are_passed_over(tmp_path, tokenizer):
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in (None, "w1 w2", "", None, "w3 w4")))
    rows = TextFiles([], test_paths=[str(path)]).documents("test")
    assert sequences(rows, tokenizer, 6, None, 0).tolist() == [[1, 2, END, 3, 4, END]]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "data.source.paths needs at least one file, got none"),
        (["missing.txt"], "data.source.paths needs existing files, got .*missing.txt, which does not exist"),
        (["folder"], "data.source.paths needs existing files, got .*folder, which is a directory"),
        (["empty.txt"], r"data.source.paths needs files with text, got .*empty.txt, which is empty \(0 bytes\)"),
        (["corpus.txt", "empty.txt"], "empty.txt, which is empty"),
        (["corpus.pdf"], r"files of one kind out of \.csv, \.json, .*got \.pdf; rename or convert"),
        (["nosuffix"], "got nosuffix; rename or convert"),
        (["corpus.txt", "corpus.jsonl"], r"got \.jsonl, \.txt; rename or convert"),
        (["corpus.txt", "corpus.txt"], "every file in one split, and once, got .*corpus.txt twice"),
        (
            ["broken.jsonl"],
            r"paths needs files that can be read, got .*broken.jsonl, line 2: it is no JSON \(.*; correct",
        ),
        (["latin.txt"], r"got .*latin.txt, line 1: it is not UTF-8 \(byte 0xe4\); convert the file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, paths, message):
    for suffix in ("txt", "jsonl"):
        write(tmp_path, suffix)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    (tmp_path / "latin.txt").write_bytes("Käse".encode("latin-1"))
    for name in ("corpus.pdf", "nosuffix"):
        (tmp_path / name).write_text("text")
    with pytest.raises(ValueError, match=message):
        TextFiles([str(tmp_path / path) for path in paths]).documents("train")


def test_a_file_in_two_splits_is_a_leak(tmp_path):
    path = write(tmp_path, "txt")
    with pytest.raises(ValueError, match=r"every file in one split, and once, got .*corpus.txt twice"):
        TextFiles([path], test_paths=[str(tmp_path / "." / "corpus.txt")])
    with pytest.raises(ValueError, match=r"data.source.test_paths needs existing files"):
        TextFiles([path], test_paths=["missing.txt"]).documents("test")


def test_missing_column_lists_the_columns(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"got 'text'; its columns are id, body"):
        TextFiles([write(tmp_path, "csv", column="body")]).documents("train")
    Dataset.from_dict({"body": TEXTS}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"got 'text'; its columns are body"):
        SavedDataset(str(tmp_path / "saved")).documents("train")
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"the hub data set owner/corpus, got 'body'; its columns are text, url"):
            hub(monkeypatch, streaming, column="body").documents("train")


def test_column_that_is_no_text(tmp_path):
    with pytest.raises(ValueError, match=r"needs a column of text, 'id' of .* holds int64"):
        TextFiles([write(tmp_path, "parquet")], column="id").documents("train")


def test_saved_data_set_with_splits(tmp_path):
    path = tmp_path / "saved"
    by_split = {"train": TEXTS[:60], "test": TEXTS[60:]}
    DatasetDict({split: Dataset.from_dict({"text": texts}) for split, texts in by_split.items()}).save_to_disk(path)
    source = SavedDataset(str(path))
    assert [source.has(split) for split in sources.SPLITS] == [True, False, True]
    assert texts_of(source, "test") == TEXTS[60:]
    assert sorted(texts_of(source, "train") + texts_of(source, "validation")) == sorted(TEXTS[:60])


@pytest.mark.parametrize("path", ["missing", "folder"])
def test_directory_that_holds_no_data_set(tmp_path, path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=f"directory with rows, written by `datasets`' save_to_disk, got .*{path}"):
        SavedDataset(str(tmp_path / path)).documents("train")


def test_hub_data_set_is_asked_for_what_was_named(monkeypatch):
    source = hub(monkeypatch, name="en", revision="abc", splits={"train": "train", "test": "validation"})
    assert texts_of(source, "test") == ["validation w1"]
    assert source.calls == [
        {"path": "owner/corpus", "name": "en", "split": "validation", "revision": "abc", "streaming": False}
    ]
    assert texts_of(hub(monkeypatch), "validation") == ["validation w1"]
    with pytest.raises(ValueError, match=r"data.source.splits maps train, validation, test, got dev"):
        HubDataset("owner/corpus", splits={"dev": "validation"})


def test_hub_without_network_names_the_options():
    with pytest.raises(ValueError, match=r"data.source.path.* must name a data set that can be read, got owner/corpus"):
        HubDataset("owner/corpus").documents("test")


def test_identity_follows_the_content(tmp_path):
    source = TextFiles([write(tmp_path, "txt")])
    first = source.identity()
    assert TextFiles([write(tmp_path, "txt")]).identity() == first
    write(tmp_path, "txt", TEXTS[1:])
    assert source.identity() != first
    write(tmp_path, "txt")
    assert TextFiles([], test_paths=[str(tmp_path / "corpus.txt")]).identity() != first
    saved = []
    for texts in (TEXTS, TEXTS[1:]):
        Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / str(len(texts)))
        saved.append(SavedDataset(str(tmp_path / str(len(texts)))).identity())
    assert saved[0] != saved[1]
    assert HubDataset("a/b", revision="x").identity() != HubDataset("a/b", revision="y").identity()


# --- the standard library ----------------------------------------------------------------------------------


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of 120 files, and what is beside it but no part of it."""
    root = tmp_path / "lib"
    extra = ["test/test_a.py", "json/tests/b.py", "idlelib/idle_test/c.py", "test_d.py", "e.txt"]
    extra += ["site-packages/f.py", "__pycache__/g.py", "email/test_h.py"]
    for index, name in enumerate([f"package{index % 7}/m{index}.py" for index in range(120)] + extra):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(TEXTS[index % 120] if index < 120 else f"excluded {name}")
    monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    return root


def test_library_leaves_tests_and_packages_out(library):
    splits = [texts_of(StandardLibrary(), split) for split in sources.SPLITS]
    assert sorted(chain(*splits)) == sorted(TEXTS)
    assert min(map(len, splits)) > 0


def test_library_file_stays_in_its_split_whatever_it_and_the_others_hold(library):
    def paths(split):
        return {row["path"] for row in StandardLibrary().documents(split).with_format(None)}  # as loaded

    before = {split: paths(split) for split in sources.SPLITS}
    for index in range(0, 120, 3):
        (library / f"package{index % 7}/m{index}.py").unlink()
    for index in range(1, 120, 3):
        (library / f"package{index % 7}/m{index}.py").write_text("other text")
    (library / "new.py").write_text("new")
    left = {path.relative_to(library).as_posix() for path in library.rglob("m*.py")}
    for split in sources.SPLITS:
        assert paths(split) - {"new.py"} == before[split] & left


def test_split_of_a_path_is_what_it_was():
    # Golden: python -c "import hashlib; print(int(hashlib.sha256(b'ast.py').hexdigest()[:16], 16) % 100)"
    golden = {"ast.py": 96, "json/decoder.py": 93, "statistics.py": 4, "struct.py": 1, "doctest.py": 8, "getpass.py": 5}
    assert {path: sources.bucket(path) for path in golden} == golden
    for split, held_out in (("train", range(10, 100)), ("validation", range(5, 10)), ("test", range(5))):
        paths = {row["path"] for row in StandardLibrary().documents(split).with_format(None)}
        assert {path for path in golden if golden[path] in held_out} == paths & set(golden)


def test_library_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match=r"the Python standard library needs .py files below .* found none"):
        StandardLibrary().documents("train")


def test_local_text_needs_no_network(tmp_path, monkeypatch, tokenizer):
    def connect(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    for source in (StandardLibrary(), TextFiles([write(tmp_path, "jsonl")])):
        data = TokenData(source, num_sequences=2, seq_len=4, num_validation=1, num_test=1)
        data.tokenizer = tokenizer
        assert [len(data.tokens(split)) for split in sources.SPLITS] == [2, 1, 1]


# --- sequences ---------------------------------------------------------------------------------------------


def test_all_text_is_cut_in_order_joined_by_the_end_token(tokenizer):
    ids = sequences(Dataset.from_dict({"text": ["w0 w1 w2", "w3", "", "w4 w5 w6"]}), tokenizer, 3, None, seed=0)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[0, 1, 2], [END, 3, END], [4, 5, 6]]  # and one END over


def test_separator_joins_lines_in_order_empty_ones_too(tokenizer):
    rows = Dataset.from_dict({"text": ["w0 w1", "", "w2 w3"]})
    ids = sequences(rows, tokenizer, 7, None, seed=0, separator=" <sep> ")
    assert ids.tolist() == [[0, 1, END + 1, END + 1, 2, 3, END + 1]]
    rows = Dataset.from_dict({"text": TEXTS})
    chosen = sequences(rows, tokenizer, 22, 60, seed=1, separator=" <sep> ")
    lines = [[WORDS.index(word) for word in text.split()] + [END + 1] for text in TEXTS]
    in_order = [first + second for first, second in zip(lines[::2], lines[1::2], strict=True)]
    assert sorted(chosen.tolist()) == sorted(in_order)  # neighbours stay together
    assert chosen.tolist() != in_order


def test_a_seed_chooses_documents_and_order(tokenizer):
    rows = Dataset.from_dict({"text": TEXTS})
    a, b, c = (sequences(rows, tokenizer, 5, 4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_sequences_hold_what_the_text_holds_and_no_padding(tokenizer):
    ids = sequences(Dataset.from_dict({"text": TEXTS}), tokenizer, 11, 120, seed=3)
    documents = [[WORDS.index(word) for word in text.split()] + [END] for text in TEXTS]
    assert sorted(ids.tolist()) == sorted(documents)
    assert tokenizer.pad_token_id not in ids


def test_a_long_document_is_not_all_there_is(tokenizer):
    texts = [" ".join([word] * 300) for word in WORDS[:10]]
    for seed in range(5):
        ids = sequences(Dataset.from_dict({"text": texts}), tokenizer, 10, 4, seed)
        assert len(ids.unique()) > 1


def test_a_stream_is_read_no_further_than_needed(tokenizer):
    read = []

    def rows():
        for index in range(100_000):
            read.append(index)
            yield {"text": TEXTS[index % 120]}

    ids = sequences(IterableDataset.from_generator(rows), tokenizer, 10, 2, seed=0)
    assert ids.shape == (2, 10)
    assert len(read) < 2000  # 32 * 2 * 10 tokens are 59 documents, after the 1000 of the shuffle buffer


def test_no_token_is_added_and_nothing_is_cut_by_the_tokenizer(tokenizer):
    limited = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<end>", model_max_length=4
    )
    limited.backend_tokenizer.enable_truncation(3)
    limited.backend_tokenizer.enable_padding(length=50)
    assert sequences(Dataset.from_dict({"text": TEXTS[:1]}), limited, 11, None, 0).shape == (1, 11)


@pytest.mark.parametrize(("num", "seq_len", "needed"), [(8, 200, 1600), (None, 2000, 2000)])
def test_too_few_tokens(tokenizer, num, seq_len, needed):
    rows = Dataset.from_dict({"text": TEXTS})
    with pytest.raises(ValueError, match=f"need {needed} tokens, my text holds 1320; ask for fewer or shorter"):
        sequences(rows, tokenizer, seq_len, num, seed=0, origin="my text")


@pytest.mark.parametrize("separator", [None, " <sep> "])
def test_text_of_empty_rows(tokenizer, separator):
    with pytest.raises(ValueError, match=r"1 sequences of 2 tokens need 2 tokens, the text holds 0"):
        sequences(Dataset.from_dict({"text": ["", ""] * 50}), tokenizer, 2, None, seed=0, separator=separator)


# --- TokenData ---------------------------------------------------------------------------------------------


@pytest.fixture
def make(tmp_path, tokenizer):
    def make(**options) -> TokenData:
        sizes = {"num_sequences": 10, "seq_len": 8, "num_validation": 2, "num_test": 3, "batch_size": 4}
        data = TokenData(TextFiles([write(tmp_path, "jsonl")]), **{**sizes, **options})
        data.tokenizer = tokenizer
        return data

    return make


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_sequences": 0}, "data.num_sequences must be from 1 to 2147483647 .*, got 0"),
        ({"num_validation": -1}, "data.num_validation must be from 1 .*, got -1"),
        ({"num_test": 0}, "data.num_test must be from 1 .*, got 0"),
        ({"seq_len": 1}, "data.seq_len must be from 2 to .*, got 1"),
        ({"batch_size": 0}, "data.batch_size must be from 1 to .*, got 0"),
        ({"num_sequences": 10**12}, "data.num_sequences must be from 1 to 2147483647 .*, got 1000000000000"),
        ({"seq_len": 2**31}, "data.seq_len must be from 2 to 2147483647, got 2147483648"),
        ({"seed": -1}, "data.seed must be from 0 to 4294967295, got -1"),
        ({"seed": 2**32}, "data.seed must be from 0 to 4294967295, got 4294967296"),
    ],
)
def test_sizes_that_make_no_sense(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_standard_library_is_the_default():
    assert isinstance(TokenData().source, StandardLibrary)


def test_sizes_are_what_was_asked_for(make):
    data = make()
    assert [tuple(data.tokens(split).shape) for split in sources.SPLITS] == [(10, 8), (2, 8), (3, 8)]
    everything = make(num_sequences=None, num_validation=None, num_test=None)
    for split in sources.SPLITS:
        assert len(everything.tokens(split)) == 11 * len(texts_of(everything.source, split)) // 8


def test_sequence_length_is_asked_for_not_the_tokenizers(make, tokenizer):
    data = make(seq_len=30, num_sequences=3, num_validation=1, num_test=1)
    data.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<end>", model_max_length=16
    )
    assert data.tokens("train").shape == (3, 30)


def test_only_calibration_depends_on_the_seed(make):
    a, b, other = make(seed=0), make(seed=0), make(seed=1)
    assert a.fingerprint("train") == b.fingerprint("train") != other.fingerprint("train")
    for split in ("validation", "test"):
        assert a.fingerprint(split) == other.fingerprint(split)


def test_another_sample_is_of_the_held_out_splits_alone(make):
    usual, other = make(), make(sample_seed=3)
    assert usual.fingerprint("train") == other.fingerprint("train")
    for split in ("validation", "test"):
        assert usual.fingerprint(split) != other.fingerprint(split)
        assert (usual.carving(split), other.carving(split)) == ({}, {"sample": 3})
    with pytest.raises(ValueError, match=r"data\.sample_seed must be from 0"):
        make(sample_seed=-1)


def test_a_run_with_the_usual_sample_is_that_of_earlier_versions():
    given = {"num_sequences": 4, "max_tokens": None, "sample_seed": 0, "num_workers": 2, "cache": "x"}
    spec = {"class_path": DEFAULT_DATA["class_path"], "init_args": given}
    assert plain_data(spec) == {"num_sequences": 4}
    assert plain_data({**spec, "init_args": {**given, "sample_seed": 3}}) == {"num_sequences": 4, "sample_seed": 3}
    assert plain_data({**spec, "class_path": "mine.Data"}) == {**spec, "class_path": "mine.Data"}


def test_calibration_sees_no_held_out_document(make):
    data = make(num_sequences=None, num_validation=None, num_test=None)
    held_out = {row for split in ("validation", "test") for row in texts_of(data.source, split)}
    seen = " ".join([*WORDS, "<end>"][index] for index in data.tokens("train").flatten())
    assert held_out
    assert not [text for text in held_out if text in seen]


def test_too_few_tokens_names_the_split_and_where_it_comes_from(make):
    with pytest.raises(
        ValueError,
        match=r"the validation split of the files .*\(it has none: 5 % of train by a hash of each document\) holds",
    ):
        make(num_validation=1000).tokens("validation")
    with pytest.raises(
        ValueError, match=r"10000 sequences of 8 tokens need 80000 tokens, the train split of the files .*l holds"
    ):
        make(num_sequences=10_000).tokens("train")


def test_tokens_need_a_tokenizer(make):
    data = make()
    data.tokenizer = None
    with pytest.raises(AssertionError, match=r"set TokenData.tokenizer first"):
        data.tokens("train")


def epoch(data, number):
    loader = data.train_dataloader()
    assert isinstance(loader.sampler, DistributedSampler)
    loader.sampler.set_epoch(number)  # what Lightning does
    return [batch["input_ids"] for batch in loader]


def test_every_epoch_has_its_own_order_that_can_be_had_again(make):
    first, second, again = epoch(make(), 0), epoch(make(), 1), epoch(make(), 0)
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert torch.equal(torch.cat(first), torch.cat(again))
    assert not torch.equal(torch.cat(first), torch.cat(second))
    rows = sorted(make().tokens("train").tolist())
    assert sorted(torch.cat(first).tolist()) == sorted(torch.cat(second).tolist()) == rows


def test_held_out_batches_are_in_order_with_the_last_one_kept(make):
    data = make(num_validation=5)
    for split, loader in (("validation", data.val_dataloader()), ("test", data.test_dataloader())):
        assert torch.equal(torch.cat([batch["input_ids"] for batch in loader]), data.tokens(split))
    assert [len(batch["input_ids"]) for batch in data.val_dataloader()] == [4, 1]


def test_processes_share_the_sequences(make, monkeypatch):
    from recon.data import module

    shares = []
    for rank in range(2):
        monkeypatch.setattr(module.dist, "is_initialized", lambda: True)
        monkeypatch.setattr(module.dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(module.dist, "get_rank", lambda rank=rank: rank)
        shares.append(torch.cat(epoch(make(), 0)).tolist())
    assert [len(share) for share in shares] == [5, 5]
    assert sorted(shares[0] + shares[1]) == sorted(make().tokens("train").tolist())
