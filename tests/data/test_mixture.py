"""Mixtures: exact shares, an order of the seed, splits that stay apart; held-out text of another source."""

import random
from fractions import Fraction

import pytest
import torch

from recon.cli import main
from recon.data import Mixture, TextFiles, TokenData
from recon.data.mixture import _shares, apportion
from recon.data.token_source import SPLITS, Draw, TokenSource
from tests.support.corpora import END, WORDS, write

LENGTH = 11  # ten words and the end: a sequence is a document
ODD = [" ".join(WORDS[2 * ((7 * row + step) % 100) + 1] for step in range(10)) for row in range(100)]
EVEN = [" ".join(WORDS[2 * ((9 * row + step) % 100)] for step in range(10)) for row in range(100)]


@pytest.fixture
def sources(tmp_path):
    """Two sources whose words tell them apart."""
    texts = {"odd": ODD, "even": EVEN}
    return [TextFiles([write(tmp_path, "jsonl", texts[name], name=name)]) for name in ("odd", "even")]


def rows(tokens) -> set[tuple[int, ...]]:
    return set(map(tuple, tokens.tolist()))


def num_odd(tokens) -> int:
    is_odd = torch.where(tokens == END, tokens[:, :1], tokens) % 2 == 1
    assert torch.equal(is_odd.all(1), is_odd.any(1))  # a sequence is of one source
    return int(is_odd.all(1).sum())


def test_shares_are_exact():
    generator = random.Random(0)
    for _ in range(300):
        shares = _shares([generator.choice([0.1, 0.3, 1.0, 2.5, 7.0]) for _ in range(generator.randint(2, 6))])
        num = generator.randint(0, 200)
        counts = apportion(shares, num)
        assert sum(shares) == 1
        assert sum(counts) == num
        rests = [num * share - count for share, count in zip(shares, counts, strict=True)]
        assert all(abs(rest) < 1 for rest in rests)
        raised, others = [rest for rest in rests if rest < 0], [rest for rest in rests if rest >= 0]
        assert all(1 + one >= other for one in raised for other in others)  # the largest remainders are raised
    assert _shares([0.1, 0.2]) == [Fraction(1, 3), Fraction(2, 3)]  # of the decimal numbers
    assert apportion([Fraction(1, 2), Fraction(1, 2)], 3) == [2, 1]


class Rows(TokenSource):
    """Sequences of even or of odd numbers, as many as asked for, different for each seed; 30 in all."""

    def __init__(self, parity: int) -> None:
        self.parity = parity

    def identity(self):
        return {"parity": self.parity}

    def sequences(self, split, draw):
        generator = torch.Generator().manual_seed(draw.seed)
        num = 30 if draw.num_sequences is None else draw.num_sequences
        return 2 * torch.randint(1000, (num, draw.seq_len), generator=generator) + self.parity


@pytest.mark.parametrize(("weights", "expected"), [(None, 8), ([3.0, 1.0], 4), ([1.0, 3.0], 12), ([0.7, 0.3], 5)])
def test_each_source_has_its_share_of_the_sequences(tokenizer, weights, expected):
    mixture, draw = Mixture([Rows(0), Rows(1)], weights), Draw(tokenizer, LENGTH, 16, seed=3)
    tokens = mixture.sequences("train", draw)
    assert tokens.shape == (16, LENGTH)
    assert num_odd(tokens) == expected
    assert torch.equal(tokens, mixture.sequences("train", draw))
    assert rows(tokens) != rows(mixture.sequences("train", Draw(tokenizer, LENGTH, 16, seed=4)))
    assert 0 < num_odd(tokens[-expected:]) < expected  # mixed, not one source behind the other
    everything = mixture.sequences("train", Draw(tokenizer, LENGTH, None, seed=0))
    shares = _shares(weights or [1.0, 1.0])
    assert len(everything) == int(30 / max(shares))
    assert [len(everything) - num_odd(everything), num_odd(everything)] == apportion(shares, len(everything))


def test_splits_are_those_of_the_sources(sources, tokenizer):
    mixture, found = Mixture(sources), {}
    for split in SPLITS:
        everything = Draw(tokenizer, LENGTH, None, seed=0)
        found[split] = rows(mixture.sequences(split, everything))
        of_sources = [source.sequences(split, everything) for source in sources]
        assert found[split] <= set.union(*map(rows, of_sources))
        assert num_odd(torch.tensor(sorted(found[split]))) * 2 == len(found[split])
        assert len(found[split]) == 2 * min(map(len, of_sources))  # all that there is in equal shares
    assert not found["train"] & found["test"]
    assert not found["train"] & found["validation"]
    assert not found["validation"] & found["test"]


def test_what_is_no_mixture(tokenizer):
    one, other = Rows(0), Rows(1)
    with pytest.raises(ValueError, match="at least two sources to mix, got 1"):
        Mixture([one])
    with pytest.raises(ValueError, match="one weight for each of 2 sources, got 1"):
        Mixture([one, other], [1.0])
    with pytest.raises(ValueError, match=r"numbers above 0, got \[1.0, 0.0\]; leave a source out"):
        Mixture([one, other], [1.0, 0.0])
    with pytest.raises(ValueError, match="every source once"):
        Mixture([one, Rows(0)]).identity()
    with pytest.raises(ValueError, match=r"a sequence of every source, got 4 sequences in shares of 0.9, 0.1; ask for"):
        Mixture([one, other], [9.0, 1.0]).sequences("train", Draw(tokenizer, LENGTH, 4, seed=0))


def test_the_identity_tells_sources_and_weights():
    pairs = [(0, 1), (1, 0), (0, 2)]
    known = [Mixture([Rows(one), Rows(other)]).identity() for one, other in pairs]
    known.append(Mixture([Rows(0), Rows(1)], [1.0, 2.0]).identity())
    assert all(known.count(one) == 1 for one in known)


def test_calibration_on_a_mixture_and_test_on_one_source(sources, tokenizer):
    sizes = {"num_sequences": 8, "seq_len": LENGTH, "num_validation": 2, "num_test": 3}
    data, plain = TokenData(Mixture(sources), **sizes, held_out=sources[1]), TokenData(sources[1], **sizes)
    data.tokenizer = plain.tokenizer = tokenizer
    assert num_odd(data.tokens("train")) == 4
    for split in ("validation", "test"):
        assert torch.equal(data.tokens(split), plain.tokens(split))
    assert data.carving("test") == {"text": str(sources[1])}
    assert data.carving("train") == plain.carving("test") == {}
    assert data.identity() != TokenData(Mixture(sources), **sizes).identity()


def test_sources_by_their_short_names_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["test", "bundled", "--data.source=Mixture", "--data.source.sources=[StandardLibrary]"]) == 2
    assert "data.source.sources needs at least two sources to mix, got 1" in capsys.readouterr().err
