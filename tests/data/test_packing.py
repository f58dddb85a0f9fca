"""Text as sequences of tokens."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerFast

from recon.data.tokens import sequences
from tests.support.corpora import END, TEXTS, WORDS


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
