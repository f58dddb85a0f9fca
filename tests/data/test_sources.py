"""Where text comes from, and its splits."""

import json
import socket
from itertools import chain

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from recon.data import HubDataset, SavedDataset, StandardLibrary, TextFiles, TokenData, sources
from recon.data.tokens import sequences
from tests.support.corpora import END, TEXTS, hub, texts_of, write


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
