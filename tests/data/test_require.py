"""What can be known before a model is pruned: sizes of all splits, tokens that are text, embeddings, positions."""

import json
import logging

import pytest
import torch

from recon.cli import main
from recon.data import TextFiles, TokenData, sources
from tests.support.corpora import write
from tests.support.families import FAMILIES, tiny

SIZES = {"num_sequences": 4, "seq_len": 8, "num_validation": 2, "num_test": 3, "batch_size": 4}


class Given(TokenData):
    """Data whose tokens do not come from a text."""

    def __init__(self, ids, **options):
        super().__init__(**{**SIZES, **options})
        self.ids = torch.as_tensor(ids)

    def tokens(self, split):
        return self.ids


def test_all_splits_are_tokenised_at_once(tmp_path, tokenizer):
    data = TokenData(TextFiles([write(tmp_path, "jsonl")]), **SIZES)
    data.tokenizer = tokenizer
    data.require(sources.SPLITS, tiny("llama", vocab_size=256))
    assert set(data._tokens) == set(sources.SPLITS)


def test_all_faults_are_named_with_their_sizes(tmp_path, tokenizer):
    data = TokenData(TextFiles([write(tmp_path, "jsonl")]), **{**SIZES, "num_validation": 50, "num_test": 60})
    data.tokenizer = tokenizer
    sizes = r"50 sequences of 8 tokens need 400 tokens, the validation .* holds \d+; .*60 sequences .* the test split"
    with pytest.raises(ValueError, match=sizes):
        data.require(sources.SPLITS, tiny("llama", vocab_size=256))
    data.require(["train"], tiny("llama", vocab_size=256))


def test_a_fault_of_all_splits_is_named_once(tmp_path, tokenizer):
    data = TokenData(TextFiles([str(tmp_path / "missing.txt")]), **SIZES)
    data.tokenizer = tokenizer
    with pytest.raises(ValueError, match=r"missing.txt, which does not exist") as caught:
        data.require(sources.SPLITS, tiny("llama", vocab_size=256))
    assert str(caught.value).count("does not exist") == 1


@pytest.mark.parametrize(("ids", "got"), [([[1, 96]], "1 to 96"), ([[-1, 5]], "-1 to 5")])
def test_ids_without_an_embedding(ids, got):
    with pytest.raises(
        ValueError, match=f"test split of .* needs token ids from 0 to 95, .* got {got}; give the model"
    ):
        Given(ids).require(["test"], tiny("llama"))


def test_sequences_of_special_and_unknown_tokens_only(tmp_path, tokenizer, caplog):
    data = TokenData(TextFiles([], test_paths=[write(tmp_path, "jsonl", ["x y z"] * 50)]), **SIZES)
    data.tokenizer = tokenizer
    with pytest.raises(
        ValueError, match=r"test split .* got 3 of 3 sequences of special and unknown tokens only; give"
    ):
        data.require(["test"], tiny("llama", vocab_size=256))
    end = tokenizer.eos_token_id
    some = Given([[end] * 8, [end] * 7 + [1]])
    some.tokenizer = tokenizer
    with caplog.at_level(logging.WARNING, "recon"):
        some.require(["test"], tiny("llama", vocab_size=256))
    assert "1 of 2 sequences of the test split" in caplog.text


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("bloom", "mpt")])
def test_a_table_of_positions_that_is_too_short_is_refused(family, caplog):
    """The reference is the model itself: a forward pass beyond its table fails, one of computed positions does not."""
    model = tiny(family)
    Given([[1] * 64], seq_len=64).require(["test"], model)
    assert not caplog.text
    try:
        with torch.no_grad():
            model(torch.ones(1, 65, dtype=torch.int64), use_cache=False)
        runs = True
    except (IndexError, RuntimeError):
        runs = False
    data = Given([[1] * 65], seq_len=65)
    with caplog.at_level(logging.WARNING, "recon"):
        if runs:
            data.require(["test"], model)
            assert "data.seq_len 65 exceeds the 64 positions the model was made for" in caplog.text
        else:
            with pytest.raises(ValueError, match=r"seq_len must be at most 64, .*, got 65; give --data.seq_len 64"):
                data.require(["test"], model)
    assert runs == (family not in ("opt", "gpt2", "gptj", "gpt_neo"))


SHAPE = (
    "{model_type: llama, vocab_size: 2048, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
    "num_attention_heads: 2, num_key_value_heads: 2, max_position_embeddings: 64}"
)


def test_the_report_of_a_run_on_one_text_file_says_that_it_was_cut(tmp_path):
    (tmp_path / "book.txt").write_text(" ".join(f"word{index}" for index in range(4000)))
    options = ["--data.num_sequences=4", "--data.seq_len=16", "--data.num_validation=2", "--data.num_test=3"]
    source = ["-c", "data/files", f"--data.source.paths=[{tmp_path}/book.txt]"]
    model = ["--model.name=random", "--model.shape", SHAPE, "--summary=false"]
    fit = ["fit", "-c", "scopes/matrix", "--trainer.accelerator=cpu", "--run_dir", str(tmp_path / "run")]
    assert main([*fit, *source, *options, *model]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["protocol"]["held_out"] == "95 to 100 % of the train text, by position"


@pytest.mark.parametrize("command", ["fit", "prune"])
def test_a_test_split_that_is_too_small_is_found_before_pruning(command, tmp_path, capsys):
    options = ["--data.num_sequences=4", "--data.seq_len=32", "--data.num_validation=2", "--data.num_test=2000000"]
    config = ["-c", "scopes/matrix", "--trainer.accelerator=cpu"] if command == "fit" else ["--criterion=Wanda"]
    pattern = [] if command == "fit" else ["--pattern=Unstructured"]
    model = ["--model.name=random", "--model.shape", SHAPE]
    assert main([command, *config, *pattern, "--run_dir", str(tmp_path / "run"), *options, *model]) != 0
    said = capsys.readouterr()
    assert "2000000 sequences of 32 tokens need 64000000 tokens, the test split" in said.err
    assert "prune" not in said.out
    assert not (tmp_path / "run" / "masks.safetensors").exists()
