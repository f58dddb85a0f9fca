"""The data module: sizes, seeds, splits and batches."""

import pytest
import torch
from torch.utils.data import DistributedSampler
from transformers import PreTrainedTokenizerFast

from recon.cli.arguments import DEFAULT_DATA, plain_data
from recon.data import StandardLibrary, TextFiles, TokenData, sources
from tests.support.corpora import WORDS, texts_of, write


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
