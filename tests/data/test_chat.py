"""Conversations: every sequence begins where the template begins, and splits share no conversation."""

import copy
import json
import logging

import pytest
from datasets import Dataset

from recon.cli import main
from recon.data import Chat
from recon.data.token_source import SPLITS, Draw
from tests.support.corpora import WORDS

BEGIN, USER, ASSISTANT = 0, 1, 2
TEMPLATE = (
    "w0 {% for message in messages %}{% if message['role'] not in ('user', 'assistant') %}"
    "{{ raise_exception('unknown role') }}{% endif %}"
    "{{ 'w1' if message['role'] == 'user' else 'w2' }} {{ message['content'] }} <sep> {% endfor %}"
)


def conversation(index: int) -> list[dict[str, str]]:
    """One to three turns, all different."""
    words = [WORDS[3 + (5 * index + step) % 190] for step in range(3 + index % 4)]
    turns = [(role, " ".join([WORDS[3 + index], *words])) for role in ("user", "assistant")] * (1 + index % 3)
    return [{"role": role, "content": content} for role, content in turns]


CHATS = [conversation(index) for index in range(90)]


@pytest.fixture
def chatty(tokenizer):
    found = copy.deepcopy(tokenizer)
    found.chat_template = TEMPLATE
    return found


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"id": index, "messages": chat}) for index, chat in enumerate(CHATS)))
    return str(path)


def ids_of(chats, tokenizer) -> list[list[int]]:
    return [tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"] for chat in chats]


def whole(row: list[int], known: list[list[int]]) -> list[list[int]]:
    """The conversations that a sequence consists of, the last one perhaps cut."""
    begins = [index for index, token in enumerate(row) if token == BEGIN]
    assert begins[0] == 0
    parts = [row[begin:end] for begin, end in zip(begins, [*begins[1:], len(row)], strict=True)]
    assert all(part in known for part in parts[:-1])
    assert any(one[: len(parts[-1])] == parts[-1] for one in known)
    return parts


@pytest.mark.parametrize("seq_len", [7, 16, 50])
def test_sequences_keep_the_borders_of_the_template(file, chatty, seq_len):
    tokens = Chat([file]).sequences("train", Draw(chatty, seq_len, 12, seed=1))
    assert tokens.shape == (12, seq_len)
    known = ids_of(CHATS, chatty)
    parts = [part for row in tokens.tolist() for part in whole(row, known)]
    assert sum(part in parts for part in known) == len([part for part in parts if part in known])  # none twice
    again = Chat([file]).sequences("train", Draw(chatty, seq_len, 12, seed=1))
    assert tokens.tolist() == again.tolist()
    assert tokens.tolist() != Chat([file]).sequences("train", Draw(chatty, seq_len, 12, seed=2)).tolist()


def test_splits_share_no_conversation(file, chatty):
    source, known = Chat([file]), ids_of(CHATS, chatty)
    shortest = min(map(len, known))
    begins = {}
    for split in SPLITS:
        rows = source.documents(split)["text"]
        begins[split] = {json.dumps(json.loads(row)) for row in rows}
        tokens = source.sequences(split, Draw(chatty, shortest, None, seed=0))
        assert len(tokens) == len(rows)  # each begins a sequence of its own, in order
        expected = ids_of([json.loads(row) for row in rows], chatty)
        assert tokens.tolist() == [ids[:shortest] for ids in expected]
    assert set.union(*begins.values()) == {json.dumps(chat) for chat in CHATS}
    assert sum(map(len, begins.values())) == len(CHATS)


def test_conversations_longer_than_a_sequence_are_told(file, chatty, caplog):
    with caplog.at_level(logging.INFO, logger="recon"):
        Chat([file]).sequences("train", Draw(chatty, 10, None, seed=0))
    lengths = [len(ids) for ids in ids_of([json.loads(row) for row in Chat([file]).documents("train")["text"]], chatty)]
    longer = [length for length in lengths if length > 10]
    assert f"{len(longer)} conversations of the train split" in caplog.text
    assert f"longer than a sequence (10 tokens), up to {max(longer)}; they are cut there" in caplog.text


def test_too_few_conversations(file, chatty):
    with pytest.raises(ValueError, match=r"must fill 500 sequences of 9 tokens, .* it fills \d+; ask for fewer"):
        Chat([file]).sequences("train", Draw(chatty, 9, 500, seed=0))


def test_a_tokenizer_without_a_template_is_refused_before_the_model_is_loaded(file, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("recon.models.loading.ModelSource.model", lambda *args: pytest.fail("a model was loaded"))
    for command in (["prune"], ["fit", "-c", "scopes/matrix"]):
        assert main([*command, "--data.source=Chat", f"--data.source.paths=[{file}]"]) != 0
        assert "chat template, got" in (error := capsys.readouterr().err)
        assert "give the tokenizer of the instruction model as model.tokenizer" in error


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "words"}, r'needs lists of messages with role and content, .* got "words"; convert'),
        ({"messages": []}, r"needs lists of messages .* got \[\]"),
        ({"messages": [{"from": "human", "value": "words"}]}, r"needs lists of messages"),
        ({"messages": [{"role": "judge", "content": "w7"}]}, r"template takes, got .*judge.*: unknown role; correct"),
        ({"text": "words"}, r"data.source.column needs a column .* got 'messages'; its columns are text"),
    ],
)
def test_rows_that_are_no_conversations(row, message, chatty, tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text(json.dumps(row))
    source = Chat([str(path)], [str(path) + ".v"], [str(path) + ".t"])
    with pytest.raises(ValueError, match=message):
        source.sequences("train", Draw(chatty, 4, 1, seed=0))


def test_files_or_a_data_set_of_the_hub(file, chatty, monkeypatch):
    for paths, path in ((None, None), ([file], "owner/chats")):
        with pytest.raises(ValueError, match=r"data\.source needs paths of files with conversations, or path"):
            Chat(paths, path=path)
    monkeypatch.setattr(
        "datasets.load_dataset",
        lambda path, name=None, *, split, **rest: {
            "train_sft": Dataset.from_list([{"messages": chat, "id": "x"} for chat in CHATS]),
        }[split].to_iterable_dataset(),
    )
    source = Chat(path="owner/chats", splits={"train": "train_sft"}, streaming=True)
    tokens = source.sequences("train", Draw(chatty, 16, 4, seed=0))
    assert all(whole(row, ids_of(CHATS, chatty)) for row in tokens.tolist())
    assert source.identity() == {
        "source": "Chat",
        "column": "messages",
        "path": "owner/chats",
        "name": "",
        "revision": "",
    }


def test_an_edited_file_is_another_text(file, tmp_path):
    before = Chat([file]).identity()
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": CHATS[0]}))
    assert Chat([file]).identity() != before
