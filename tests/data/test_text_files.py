"""Local files: whole documents in one split, contiguous parts of one text, and messages that name file and line."""

import json
from itertools import chain
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset

from recon.data import HubDataset, SavedDataset, TextFiles, TokenData, sources
from recon.data.cutting import part_of
from recon.data.tokens import sequences
from tests.support.corpora import TEXTS, WORDS, hub, texts_of, write

BOOK = [" ".join(f"c{paragraph}x{word}" for word in range(20)) for paragraph in range(100)]
"""100 paragraphs of 20 words; a word tells its place."""


def words_of(source, split) -> list[str]:
    return " ".join(texts_of(source, split)).split()


# --- splits of text files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("between", ["\n\n", "\n", " "])
def test_one_text_file_is_cut_into_contiguous_parts(tmp_path, between):
    (tmp_path / "book.txt").write_text(between.join(BOOK))
    source = TextFiles([str(tmp_path / "book.txt")])
    train, validation, test = (words_of(source, split) for split in sources.SPLITS)
    assert train + validation + test == " ".join(BOOK).split()  # in order, none twice, none lost
    assert [len(train), len(validation), len(test)] == pytest.approx([1800, 100, 100], abs=8)
    assert source.carving("train") == ""
    assert source.carving("validation") == "90 to 95 % of the train text, by position"
    assert source.carving("test") == "95 to 100 % of the train text, by position"


def test_a_test_file_leaves_more_of_the_book_to_train(tmp_path):
    book, test = write(tmp_path, "txt", BOOK, name="book"), write(tmp_path, "txt", TEXTS, name="test")
    source = TextFiles([book], test_paths=[test])
    assert source.carving("validation") == "95 to 100 % of the train text, by position"
    assert words_of(source, "train") + words_of(source, "validation") == " ".join(BOOK).split()
    assert texts_of(source, "test") == TEXTS


def test_text_without_spaces_is_cut_too(tmp_path):
    (tmp_path / "book.txt").write_text("漢字" * 1000)
    source = TextFiles([str(tmp_path / "book.txt")])
    parts = ["".join(texts_of(source, split)) for split in sources.SPLITS]
    assert [len(part) for part in parts] == [1800, 100, 100]


def test_a_text_file_falls_into_one_split_as_a_whole(tmp_path):
    paths = [write(tmp_path, "txt", [f"f{index}a", f"f{index}b"], name=str(index)) for index in range(80)]
    source = TextFiles(paths)
    splits = [words_of(source, split) for split in sources.SPLITS]
    files = [{word[:-1] for word in words} for words in splits]
    assert all(files)
    assert sum(map(len, files)) == 80 == len(set.union(*files))
    assert all(len(words) == 2 * len(names) for words, names in zip(splits, files, strict=True))
    expected = {f"f{Path(path).stem}" for path in paths if sources.bucket(Path(path).read_text()) < 5}
    assert files[2] == expected
    assert source.carving("test") == "5 % of train by a hash of each file"


def test_a_copy_of_a_file_is_in_the_same_split(tmp_path):
    texts = [[f"f{index}a", f"f{index}b"] for index in range(80)]
    paths = [write(tmp_path, "txt", one, name=f"{copy}-{index}") for copy in "xy" for index, one in enumerate(texts)]
    splits = [set(words_of(TextFiles(paths), split)) for split in sources.SPLITS]
    assert sum(map(len, splits)) == 160 == len(set.union(*splits))


def test_few_files_are_cut_by_position(tmp_path):
    paths = [write(tmp_path, "txt", BOOK[index : index + 20], name=str(index)) for index in range(0, 100, 20)]
    source = TextFiles(paths)
    parts = [words_of(source, split) for split in sources.SPLITS]
    assert list(chain(*parts)) == " ".join(BOOK).split()
    assert min(map(len, parts)) > 90
    assert "by position" in source.carving("test")


def test_rows_with_a_separator_are_one_text(tmp_path, monkeypatch):
    Dataset.from_dict({"text": BOOK}).save_to_disk(tmp_path / "saved")
    lines = TextFiles([write(tmp_path, "jsonl", BOOK)], separator="\n")
    saved = SavedDataset(str(tmp_path / "saved"), separator="\n")
    for source in (lines, saved):
        assert list(chain(*(words_of(source, split) for split in sources.SPLITS))) == " ".join(BOOK).split()
        assert "by position" in source.carving("validation")
    stream = hub(monkeypatch, streaming=True, splits={"train": "train", "test": "test"}, separator="\n")
    with pytest.raises(ValueError, match=r"cut into splits by position.*got streaming: true; set .*streaming: false"):
        stream.documents("validation")


def test_parts_meet_and_empty_rows_are_kept():
    rows = Dataset.from_dict({"text": ["", "ab cd", None, "", "ef gh ij", "kl"]})
    everything = [row["text"] for row in part_of(rows, 0, 100)]
    assert everything == ["", "ab cd", None, "", "ef gh ij", "kl"]
    for middle in range(1, 100):
        parts = [[row["text"] or "" for row in part_of(rows, *ends)] for ends in ((0, middle), (middle, 100))]
        assert "".join(parts[0] + parts[1]) == "ab cdef gh ijkl"


def test_the_protocol_says_that_a_text_was_cut(tmp_path):
    data = TokenData(TextFiles([write(tmp_path, "txt", BOOK)]))
    assert data.carving("test") == {"held_out": "95 to 100 % of the train text, by position"}
    assert data.carving("train") == {}
    assert TokenData().carving("test") == {}


# --- damage ------------------------------------------------------------------------------------------------

GOOD = "\n".join(json.dumps({"text": text}) for text in TEXTS[:50])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            f'{GOOD}\n{{"text": "x"\n{GOOD}',
            r"a.jsonl, line 51: it is no JSON \(.*; correct or delete the line",
        ),
        ("a.jsonl", f"{GOOD}\n[1, 2]", r"a.jsonl, line 51: it is a list; each row needs an object such as \{.text"),
        ("a.jsonl", f'{GOOD}\n{{"text": 3}}', "a.jsonl, line 51: 'text' is a number; it needs a string"),
        ("a.jsonl", '{"text": ["a", "b"]}', "a.jsonl, row 1: 'text' is a list; it needs a string"),
        ("a.jsonl", "\n\n", "a.jsonl, which holds white space only"),
        (
            "a.jsonl",
            f'{GOOD}\n{{"text": "K\xe4se"}}'.encode("latin-1"),
            r"line 51: it is not UTF-8 \(byte 0xe4\); convert",
        ),
        ("a.json", '[{"text": "a"},\n{"text": "b"', r"a.json, line 2: it is no JSON \(.*; correct the file"),
        ("a.json", '{"data": [{"text": "a"}]}', "column needs a column of .*a.json, got 'text'; its columns are data"),
        ("a.txt", "Käse".encode("utf-16"), r"a.txt, line 1: it is not UTF-8 \(byte 0xff\); convert .* iconv"),
        ("a.csv", "id,text\n1,a\n2,b,c,d\n", "a.csv, line 3: it has 4 fields, the header has 2; put text with commas"),
        ("a.csv", "id,text\n", "a.csv, which holds a header and no rows"),
        ("a.csv", 'id,text\n1,"a\n2,b\n', "a.csv, line 3: .*; correct the quotes"),
        ("a.csv", "id,text\n1,K\xe4se\n".encode("latin-1"), r"a.csv, line 2: it is not UTF-8 \(byte 0xe4\)"),
        ("a.csv", "1,a\n2,b\n", "column needs a column of .*a.csv, got 'text'; its columns are 1, a"),
        ("a.parquet", b"PAR1garbage", "a.parquet, which is no Parquet file or is damaged .*; write it again"),
    ],
)
def test_damage_is_named_by_file_and_line(tmp_path, name, content, message):
    good = write(tmp_path, Path(name).suffix[1:], name="good")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for paths in ([good, str(tmp_path / name)], [str(tmp_path / name)]):
        if len(paths) > 1 and any(one in message for one in ("column needs", "is a number", "space only", "no rows")):
            continue  # files beside a good one may have another column, be cast to its types, or be empty
        with pytest.raises(ValueError, match=message) as caught:
            TextFiles([], test_paths=paths).documents("test")
        assert str(caught.value).startswith("data.source.")
        assert len(str(caught.value)) < 600


def test_parquet_without_the_column(tmp_path):
    with pytest.raises(
        ValueError, match=r"data.source.column needs a column of .*got 'text'; its columns are id, body"
    ):
        TextFiles([write(tmp_path, "parquet", column="body")]).documents("train")


@pytest.mark.parametrize("damage", ["cut", "no rows", "no state"])
def test_saved_data_set_that_is_damaged(tmp_path, damage):
    path = tmp_path / "saved"
    Dataset.from_dict({"text": [] if damage == "no rows" else TEXTS}).save_to_disk(path)
    if damage == "cut":
        (arrow,) = path.glob("*.arrow")
        arrow.write_bytes(arrow.read_bytes()[:60])
    if damage == "no state":
        (path / "state.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"needs a directory with rows, written by .*saved: .*; save the data set again"
    ):
        SavedDataset(str(path)).documents("train")


def test_hub_data_set_with_a_script(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "corpus.py").write_text("raise SystemExit")
    with pytest.raises(
        ValueError, match=r"got .*corpus: .*scripts are no longer .* data.source.revision: refs/convert/"
    ):
        HubDataset(str(tmp_path / "corpus")).documents("train")
    with pytest.raises(ValueError, match=r"data.source.path needs the name of a data set on the hub, got an empty one"):
        HubDataset("")


@pytest.mark.parametrize(("options", "named"), [({"name": "zz"}, "zz"), ({"splits": {"test": "dev"}}, "dev")])
def test_configuration_or_split_that_the_hub_data_set_lacks(tmp_path, options, named):
    (tmp_path / "corpus").mkdir()
    write(tmp_path / "corpus", "jsonl", name="train")
    with pytest.raises(ValueError, match=rf"data.source.path, .name and .splits must name .*corpus: .*{named}"):
        HubDataset(str(tmp_path / "corpus"), **options).documents("test")


def test_a_stream_that_breaks_off(tokenizer):
    def rows():
        yield {"text": WORDS[0]}
        raise ConnectionError("reset by peer")

    with pytest.raises(ValueError, match=r"my text must be readable to its end, got ConnectionError: reset by peer"):
        sequences(IterableDataset.from_generator(rows), tokenizer, 2, None, seed=0, origin="my text")
