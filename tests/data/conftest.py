"""A tokenizer of words, and a cache of the test's own."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.corpora import WORDS


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
