"""The verdict on sparsity and the tables, computed from figures made by hand."""

import io
import json
import re

import pytest
from rich.console import Console

from recon.report.speed import MatrixSpeed, Product, Speed, Stored
from recon.report.speed_table import speed_sections
from recon.report.speed_verdict import gains, verdict
from recon.report.table import print_section

TOKENS = (1, 16, 256)


def stored(name: str, *milliseconds: float, spread: float = 0.1, num_bytes: int = 1000) -> Stored:
    """A storage whose quartiles are the median ± `spread` of it."""
    products = [
        Product(tokens, 1e-6, ms / 1000, ms / 1000 * (1 - spread), ms / 1000 * (1 + spread), 5)
        for tokens, ms in zip(TOKENS, milliseconds, strict=True)
    ]
    return Stored(name, num_bytes=num_bytes, error=1e-6, products=products)


def speed(*shapes: tuple[int, list[Stored]]) -> Speed:
    """A measurement of matrices 8 x 4, 16 x 4 and so on: their number, and their storages."""
    return Speed(
        run_dir="runs/x",
        pattern="2:4",
        sparsity=0.5,
        dtype="float16",
        tolerance=4e-3,
        tokens=TOKENS,
        seed=0,
        min_seconds=0.5,
        environment={"device": "A GPU", "threads": 1, "capability": (9, 0)},
        digests={"masks": "a", "model": "b"},
        matrices=[
            MatrixSpeed(f"layers.{place}.weight", 8 * 2**place, 4, count, 0.5, of)
            for place, (count, of) in enumerate(shapes)
        ],
    )


@pytest.mark.parametrize(
    ("milliseconds", "said"),
    [
        ((4, 8, 16), "save no time: CSR is slower than dense at every batch (0.5x), with 0.6x of its bytes."),
        ((20, 8, 16), "save no time: CSR is slower than dense at every batch (0.1x to 0.5x), with"),
        ((1, 2, 4), "save time: CSR is faster than dense at every batch (2x), with 0.6x of its bytes."),
        ((2.1, 3.9, 8), "save no time: CSR is as fast as dense within the spread at every batch (0.95x to 1x), with"),
        (
            (4, 4.1, 2),
            "save time: CSR is faster than dense at 256 tokens (4x), as fast as dense within the spread at 16 tokens "
            "(0.98x) and slower than dense at 1 token (0.5x), with 0.6x of its bytes.",
        ),
        (
            (8, 16, 4),
            "save time: CSR is faster than dense at 256 tokens (2x) and slower than dense at 1 and 16 tokens (0.25x)",
        ),
    ],
)
def test_the_sentence_follows_from_the_figures(milliseconds: tuple[float, ...], said: str) -> None:
    found = verdict(speed((2, [stored("dense", 2, 4, 8), stored("CSR", *milliseconds, num_bytes=600)])))
    assert found.startswith("On A GPU (1 thread), 50 % zeros (2:4, float16) save ")
    assert said in found
    assert found.count(".") == found.count("0.") + 1  # one sentence


def test_a_model_counts_all_its_matrices() -> None:
    """Ten small matrices that lose outweigh a large one that wins."""
    one = (1, [stored("dense", 10, 10, 10, num_bytes=900), stored("CSR", 5, 5, 5, num_bytes=300)])
    ten = (10, [stored("dense", 1, 1, 1, num_bytes=90), stored("CSR", 3, 2, 1, num_bytes=60)])
    found = gains(speed(one, ten), "CSR")
    assert [gain.tokens for gain in found] == [1, 16, 256]
    assert [gain.speed for gain in found] == pytest.approx([20 / 35, 20 / 25, 20 / 15])
    assert [gain.seconds for gain in found] == pytest.approx([0.035, 0.025, 0.015])
    assert [gain.outcome for gain in found] == ["slower", "slower", "faster"]
    assert "with 0.5x of its bytes" in verdict(speed(one, ten))


def test_only_matrices_timed_in_both_are_compared() -> None:
    needs = Stored("2:4", "needs", "the pattern 2:4")
    fits = (1, [stored("dense", 2, 2, 2), stored("2:4", 1, 1, 1)])
    other = (50, [stored("dense", 9, 9, 9), needs])
    assert [gain.speed for gain in gains(speed(fits, other), "2:4")] == pytest.approx([2, 2, 2])
    none = speed((1, [stored("dense", 2, 2, 2), needs]))
    assert gains(none, "2:4") == []
    assert verdict(none).endswith("no storage of 50 % zeros (2:4, float16) could be compared with dense.")


def printed(of: Speed) -> str:
    console = Console(file=io.StringIO(), width=100)
    for section in speed_sections(of):
        print_section(section, console)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_the_tables_name_what_is_wrong_and_what_is_missing() -> None:
    wrong = Stored("CSR", "wrong", "error 2e-01 for inputs of 16 x 4", 500, 0.2, stored("CSR", 1, 1, 1).products[:1])
    failed = Stored("packed", "failed", "no kernel")
    needs = Stored("2:4", "needs", "a GPU")
    first = (3, [stored("dense", 2, 4, 8), wrong, stored("packed", 4, 4, 4, num_bytes=250), needs])
    second = (1, [stored("dense", 2, 4, 8), stored("CSR", 1, 2, 4), failed, needs])
    of = speed(first, second)
    text = printed(of)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "8 x 4 CSR 3 50.0 0.5 0.5x 2e-01 wrong" in lines
    assert "16 x 4 packed 1 50.0 - - - failed" in lines
    assert "8 x 4 packed 3 50.0 0.2 0.25x 1e-06 ok" in lines
    assert "CSR for 8 x 4 is wrong: error 2e-01 for inputs of 16 x 4" in lines
    assert "packed for 16 x 4 failed: no kernel" in lines
    assert "2:4 was not timed: it needs a GPU" in lines
    assert "8 x 4 1 2.00 ms ±10% 1.00 ms ±10% 2x 4.00 ms ±10% 0.5x" in lines
    assert "8 x 4 16 4.00 ms ±10% wrong - 4.00 ms ±10% 1x" in lines
    assert "16 x 4 256 8.00 ms ±10% 4.00 ms ±10% 2x failed -" in lines
    assert "all 16 16.0 ms - - - -" in lines  # sums over different matrices would not compare
    assert "CSR is faster than dense at every batch (2x) in 1 of 4 matrices, with 1x of its bytes" in verdict(of)
    assert "packed is slower" not in verdict(of)
    assert not re.search(r"^(8|16) x 4 2:4", text, flags=re.MULTILINE)


def test_dense_that_is_wrong_is_compared_with_nothing() -> None:
    wrong = Stored("dense", "wrong", "error 2e-01 for inputs of 1 x 4", 500, 0.2)
    of = speed((1, [wrong, stored("CSR", 1, 1, 1)]))
    assert "could be compared" in verdict(of)
    assert [one.storage for _, one in of.wrong] == ["dense"]
    assert "all 1 - - -" in [" ".join(line.split()) for line in printed(of).splitlines()]


@pytest.mark.parametrize(
    ("milliseconds", "shown"), [(0.0004, "0.40 us"), (0.01234, "12.3 us"), (123.4, "123 ms"), (2345, "2.35 s")]
)
def test_times_have_three_digits(milliseconds: float, shown: str) -> None:
    assert f"{shown} ±10%" in printed(speed((1, [stored("dense", milliseconds, 1, 1), stored("CSR", 1, 1, 1)])))


def test_the_record_is_strict_json() -> None:
    of = speed((1, [stored("dense", 1, 1, 1), Stored("2:4", "needs", "a GPU")]))
    content = json.loads(json.dumps(of.as_dict(), allow_nan=False))
    assert content["format"] == "recon-speed-1"
    assert content["environment"]["capability"] == [9, 0]
    assert content["matrices"][0]["stored"][0]["products"][0]["tokens"] == 1
