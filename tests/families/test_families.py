"""The page of families tells the truth: its rows are tried again, and its counts are those of its rows."""

import re
from pathlib import Path

import pytest
import transformers

from tests.families.outcome import SCOPES, outcome_of, recover
from tests.families.page import PAGE, ROOT, counts, outcomes, page, read_recovered, rows
from tests.families.small import MODEL_TYPES

SAMPLE = [
    *("llama", "gemma2", "gpt2", "opt", "mpt", "falcon", "whisper"),
    *("lfm2", "qwen3_5_text", "bamba", "falcon_h1", "mamba2", "rwkv", "recurrent_gemma"),
    *("mixtral", "gpt_oss", "deepseek_v3", "llama4_text", "nemotron_h", "qwen3_next"),
    *("hrm_text", "xlm", "zamba2", "dbrx"),
]
RECOVERED = [name for name, of_type in read_recovered().items() if name in SAMPLE and set(of_type.values()) == {"ok"}]
KNOWN = rows(PAGE.read_text())


@pytest.mark.parametrize("family", SAMPLE)
def test_a_sample_of_the_page_is_true(family: str) -> None:
    if family not in MODEL_TYPES:
        pytest.skip(f"needs a version of transformers that knows {family}")
    outcome = outcome_of(family)
    assert (outcome.status, outcome.text if outcome.status == "accepted" else "") == KNOWN[family]


def test_counts_are_those_of_the_rows() -> None:
    text = PAGE.read_text()
    numbers = [int(number) for number in re.findall(r"\d+", text.partition("\nOf ")[2].partition("reason.")[0])]
    statuses = [status for status, _ in KNOWN.values()]
    accepted, refused = statuses.count("accepted"), statuses.count("refused")
    whole = [
        name for name, of_type in read_recovered().items() if [of_type.get(scope) for scope in SCOPES] == ["ok"] * 3
    ]
    built = accepted + refused
    assert numbers == [len(KNOWN), built, accepted, built, len(set(whole) & set(KNOWN)), refused]
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"on {accepted} of the {built} causal-LM configurations" in readme


@pytest.mark.slow
def test_the_whole_page_is_true() -> None:
    if f"transformers {transformers.__version__};" not in PAGE.read_text():
        pytest.skip("needs the version of transformers that the page names")
    found = outcomes()
    assert counts(found, read_recovered()) in PAGE.read_text()
    assert page(found, read_recovered()) == PAGE.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", RECOVERED)
def test_a_sample_of_accepted_families_is_recovered(family: str, scope: str, tmp_path: Path) -> None:
    assert recover(family, scope, tmp_path) == "ok"
