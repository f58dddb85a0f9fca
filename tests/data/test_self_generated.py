"""Text that the dense model writes: a function of its identity alone, wherever the model is and whoever asks."""

import dataclasses
import itertools
import json
import logging
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import recon
from recon.cli import main
from recon.data import Mixture, SelfGenerated, StandardLibrary, TokenData
from recon.data.self_generated import repetition
from recon.data.texts import Texts
from recon.data.token_source import Draw
from recon.models.author import DenseAuthor
from recon.models.loading import ModelSource
from recon.models.offload.opening import open_offloaded
from recon.models.replay import Replay
from tests.support.families import VOCABULARY, tiny

END, LENGTH = 2, 20
CPU = torch.device("cpu")


class Counting:
    """An author who notes the seeds of what it writes, and is killed at one of the calls."""

    def __init__(self, author: DenseAuthor, killed_at: int | None = None) -> None:
        self.author, self.killed_at, self.calls = author, killed_at, 0

    def identity(self):
        return self.author.identity()

    def write(self, *args):
        if self.calls == self.killed_at:
            raise KeyboardInterrupt
        self.calls += 1
        return self.author.write(*args)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A tiny model in a directory, with one token a word."""
    words = {f"w{index}": index for index in range(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    directory = tmp_path_factory.mktemp("model")
    tiny("llama").save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w2", unk_token="w0").save_pretrained(directory)
    return str(directory)


@pytest.fixture
def author(model) -> DenseAuthor:
    source = ModelSource(model)
    dense = source.model()
    return DenseAuthor(source, source.load_tokenizer(), {}, lambda: dense)


def written(cache: Path, author, num=6, seed=0, **options) -> torch.Tensor:
    source = SelfGenerated(**{"batch_size": 4, "cache": str(cache), "min_tokens": 2, "max_repetition": 1.0, **options})
    tokenizer = getattr(author, "author", author).tokenizer
    return source.sequences("train", Draw(tokenizer, LENGTH, num, seed, author))


def test_the_seed_decides_the_text(tmp_path, author):
    tokens = written(tmp_path / "one", author)
    assert tokens.shape == (6, LENGTH)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        state = torch.get_rng_state()
        assert torch.equal(tokens, written(tmp_path / "two", author))
        assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(tokens, written(tmp_path / "one", author, seed=1))


def test_each_batch_is_written_once_and_fewer_sequences_are_the_first_of_more(tmp_path, author):
    counting = Counting(author)
    eight = written(tmp_path, counting, num=8)
    num_batches = counting.calls
    assert torch.equal(written(tmp_path, counting, num=3), eight[:3])
    assert torch.equal(written(tmp_path, counting, num=8), eight)
    assert counting.calls == num_batches
    assert torch.equal(written(tmp_path, counting, num=16)[:8], eight)
    assert counting.calls > num_batches


@pytest.mark.parametrize("killed_at", [0, 1, 2])
def test_a_killed_run_goes_on_with_the_same_bits(killed_at, tmp_path, author):
    expected = written(tmp_path / "whole", author, num=12)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "killed", Counting(author, killed_at), num=12)
    resumed = Counting(author)
    assert torch.equal(written(tmp_path / "killed", resumed, num=12), expected)
    files = {one.name: one.read_bytes() for one in (tmp_path / "whole").rglob("*.safetensors")}
    assert files == {one.name: one.read_bytes() for one in (tmp_path / "killed").rglob("*.safetensors")}
    assert resumed.calls == len(files) - killed_at


def test_a_damaged_file_is_written_again(tmp_path, author):
    expected = written(tmp_path, author)
    for file in tmp_path.rglob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    assert torch.equal(written(tmp_path, author), expected)


@pytest.mark.parametrize("offload", ["host", "disk"])
def test_an_offloaded_model_writes_the_same(offload, tmp_path, author):
    offloaded = open_offloaded(author.source, offload, CPU, None)
    replay = Replay.within(offloaded)
    other = dataclasses.replace(author, opened=lambda: replay)
    assert torch.equal(written(tmp_path / "one", author), written(tmp_path / "two", other))


def test_texts_end_with_the_end_token_and_sequences_begin_where_they_begin(tmp_path, author):
    source = SelfGenerated(batch_size=8, cache=str(tmp_path), min_tokens=1, max_repetition=1.0)
    texts = list(itertools.islice(source._texts(Draw(author.tokenizer, LENGTH, None, 0, author)), 48))
    ended = [ids for ids in texts if len(ids) < LENGTH]
    assert ended
    assert all(END not in ids[:-1] for ids in texts)
    assert all(ids[-1] == END for ids in ended)
    begins = [token for ids in texts for token in ids[:1]]
    assert not {0, END} & set(begins)  # special tokens are not drawn
    assert len(set(begins)) > 20
    for row in source.sequences("train", Draw(author.tokenizer, LENGTH, 12, 0, author)).tolist():
        assert any(row[: len(ids)] == ids for ids in texts)


def test_options_that_came_with_the_model_do_not_count(tmp_path, author):
    habitual = author.source.model()
    habitual.generation_config.update(repetition_penalty=5.0, min_new_tokens=LENGTH, top_p=0.1, temperature=0.1)
    other = dataclasses.replace(author, opened=lambda: habitual)
    assert torch.equal(written(tmp_path / "one", author), written(tmp_path / "two", other))
    assert habitual.generation_config.repetition_penalty == 5.0


def test_sampling_is_that_of_the_model(tmp_path, author):
    source = SelfGenerated(batch_size=64, cache=str(tmp_path), top_k=2, min_tokens=1)
    texts = itertools.islice(source._texts(Draw(author.tokenizer, 6, None, 0, author)), 64)
    whole = author.source.model()
    with torch.no_grad():
        for ids in texts:
            likeliest = whole(torch.tensor([ids])).logits[0, :-1].topk(2).indices.tolist()
            assert all(token in best for token, best in zip(ids[1:], likeliest, strict=True))


DECISIVE = [{"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.5}, {"prompts": StandardLibrary(), "prompt_tokens": 3}]


def test_all_that_decides_the_text_is_in_its_identity(tmp_path, author, model):
    known = [SelfGenerated().identity()]
    for options in [*DECISIVE, {"batch_size": 5}, {"min_tokens": 17}, {"max_repetition": 0.4}, {"first_token": "bos"}]:
        known.append(SelfGenerated(**options).identity())
    assert all(known.count(one) == 1 for one in known)
    assert SelfGenerated(cache="elsewhere").identity() == known[0]

    def num_texts() -> int:
        return len(list(tmp_path.glob("*/manifest.json")))

    others = [author, *(dataclasses.replace(author, versions={"torch": version}) for version in "12")]
    others.append(dataclasses.replace(author, source=ModelSource(model, dtype="bfloat16")))
    for number, other in enumerate(others, 1):
        written(tmp_path, other)
        assert num_texts() == number
    for number, options in enumerate(DECISIVE[:3], len(others) + 1):
        written(tmp_path, author, **options)
        assert num_texts() == number
    written(tmp_path, author, min_tokens=3, max_repetition=0.9)  # filters are applied when the text is read
    assert num_texts() == len(others) + 3


def test_prompts_are_beginnings_from_the_train_split(tmp_path, author):
    prompts = Texts([" ".join(f"w{10 + (7 * row + step) % 80}" for step in range(12)) for row in range(300)])
    source = SelfGenerated(prompts, prompt_tokens=4, min_tokens=5, batch_size=8, cache=str(tmp_path))
    texts = list(itertools.islice(source._texts(Draw(author.tokenizer, LENGTH, None, 0, author)), 16))
    train = [author.tokenizer(row["text"])["input_ids"] + [END] for row in prompts.documents("train")]
    pieces = {tuple((one + other)[start : start + 4]) for one in train for other in train for start in range(len(one))}
    assert {tuple(ids[:4]) for ids in texts} <= pieces
    assert len({tuple(ids[:4]) for ids in texts}) > 8
    assert all(len(ids) > 4 for ids in texts)


def test_repetition_is_the_share_of_pieces_that_stood_before():
    generator = random.Random(0)
    for _ in range(50):
        ids = [generator.randrange(3) for _ in range(generator.randint(0, 40))]
        counts = Counter(tuple(ids[start : start + 4]) for start in range(max(0, len(ids) - 3)))
        expected = sum(count - 1 for count in counts.values()) / max(1, counts.total())
        assert repetition(ids) == pytest.approx(expected)
    assert repetition([7] * 100) > 0.98
    assert repetition(list(range(100))) == 0.0


def test_filters_drop_texts_and_say_so(tmp_path, author, caplog):
    with caplog.at_level(logging.INFO, logger="recon"):
        tokens = written(tmp_path, author, num=8, min_tokens=LENGTH)
    assert (tokens != END)[:, :-1].all()  # no text that ended early is left
    assert "dropped as shorter than 20 tokens" in caplog.text
    with pytest.raises(ValueError, match=r"must keep more than one text of 8, got \d+ of 4\d .* and \d+ with more rep"):
        written(tmp_path, author, num=8, max_repetition=0.0, temperature=0.01, min_tokens=LENGTH)
    short = written(tmp_path, author, num=6, temperature=50.0, batch_size=64, min_tokens=1)  # many texts a sequence
    assert len(short) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_repetition": 2.0}, "max_repetition must be from 0 to 1, got 2.0"),
        ({"prompts": SelfGenerated()}, "prompts needs text that people wrote"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        SelfGenerated(**options)


def test_what_it_needs_is_said(tmp_path, author):
    source = SelfGenerated(min_tokens=2, cache=str(tmp_path))
    with pytest.raises(ValueError, match=r"needs that model, got none: it is there in `recon prune`"):
        source.sequences("train", Draw(author.tokenizer, LENGTH, 2, 0))
    with pytest.raises(ValueError, match=r"got a call for a test split; give .*data.held_out"):
        source.sequences("test", Draw(author.tokenizer, LENGTH, 2, 0, author))
    with pytest.raises(ValueError, match=r"got a call for all of it"):
        source.sequences("train", Draw(author.tokenizer, LENGTH, None, 0, author))
    with pytest.raises(ValueError, match=r"data.seq_len must be at least data.source.min_tokens .* got 20, 21 and 16"):
        written(tmp_path, author, min_tokens=21)
    with pytest.raises(
        ValueError, match=r"first_token: bos needs a tokenizer .* choose data.source.first_token: random"
    ):
        written(tmp_path, author, first_token="bos")
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"data.source.cache needs a directory that can be made and written, got .*file"
    ):
        written(tmp_path / "file", author)
    for text in (source, Mixture([source, StandardLibrary()])):
        with pytest.raises(ValueError, match=r"need text that people wrote, got .*data.held_out StandardLibrary"):
            TokenData(text)
        assert TokenData(text, held_out=StandardLibrary()).source_of("test").is_written is False


SHAPE = {"model_type": "llama", "vocab_size": 2048, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
SHAPE |= {"num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 0}
MODEL = ["--model.name=random", f"--model.shape={json.dumps(SHAPE)}"]
DATA = {"num_sequences": 8, "seq_len": 32, "num_validation": 2, "num_test": 2, "held_out": "StandardLibrary"}


@pytest.mark.slow
def test_pruning_recovery_and_another_seed(tmp_path, monkeypatch, capsys):
    """Both commands share a text, of which the report names what was measured; another seed has another text."""
    monkeypatch.chdir(tmp_path)
    mixed = json.dumps({"class_path": "Mixture", "init_args": {"sources": ["SelfGenerated", "StandardLibrary"]}})
    args = [*MODEL, f"--data.source={mixed}", *(f"--data.{name}={value}" for name, value in DATA.items())]
    common = [*args, "--drift=false", "--baselines=false", "--summary=false"]
    assert main(["prune", *common, "--run_dir=pruned"]) == 0
    texts = {one: one.stat().st_mtime_ns for one in Path("runs/generated").rglob("*.safetensors")}
    assert len(texts) == 1
    assert main(["fit", "-c", "scopes/matrix", *common, "--run_dir=fitted", "--masks=pruned/masks.safetensors"]) == 0
    assert {one: one.stat().st_mtime_ns for one in Path("runs/generated").rglob("*.safetensors")} == texts
    report = json.loads(Path("fitted/report.json").read_text())
    assert report["protocol"]["text"] == "the Python standard library"
    assert main(["test", "fitted", "--run_dir=tested"]) == 0  # asks for the test split alone: no dense model is there
    assert json.loads(Path("tested/report.json").read_text())["perplexity"] == report["perplexity"]
    assert main(["prune", *common, "--seed_everything=1", "--run_dir=other"]) == 0
    assert len(list(Path("runs/generated").rglob("*.safetensors"))) == 2
    assert main(["fit", "-c", "scopes/matrix", *common, "--run_dir=fitted", "--data.source=StandardLibrary"]) == 1
    assert "whose run differs in" in capsys.readouterr().err


def test_a_live_model_writes_from_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = ModelSource("random", SHAPE).load()
    options = {f"data.{name}": value for name, value in DATA.items()}
    text = Mixture([SelfGenerated(batch_size=4, cache=str(tmp_path / "cache")), StandardLibrary()], [1.0, 3.0])
    masks = recon.prune(model, tokenizer, text=text, options=options)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1
    report = recon.recover(
        model, tokenizer, masks, scope="matrix", text=text, options=options, baselines=False, drift=False
    )
    assert report.perplexity
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1
