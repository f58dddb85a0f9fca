"""Any set of runs in one table: references, duplicates, labels, width, and what --verbose adds."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from recon.cli import main
from recon.report import Report, Results, collect, print_table, with_references
from recon.report.log import log_to
from tests.report.test_report import report

SIZES = {"sparsity": 0.0, "model_sparsity": 0.01, "disk_bytes": 5 * 2**20}


def recovered(scope: str = "submodule", **changes: Any) -> Report:
    references = {"dense": SIZES, "pruned": {"sparsity": 0.5, "model_sparsity": 0.4}}
    own = {"model_sparsity": 0.41, "disk_bytes": 3 * 2**20, "references": references}
    return report(scope, **(own | {"train_tokens": 512} | changes))


def lines(results: Results, **options: Any) -> list[list[str]]:
    file = io.StringIO()
    print_table(results, Console(file=file, width=100), **options)
    assert all(len(line) <= 100 for line in file.getvalue().splitlines())
    return [line.split() for line in file.getvalue().splitlines()]


def test_a_run_has_three_rows_with_zeros_and_sizes() -> None:
    table = lines(Results(with_references(recovered())))
    assert ["dense", "10.00", "100.0", "0.0", "1.0", "5.0", "-", "-", "-"] in table
    assert ["pruned", "20.00", "0.0", "50.0", "40.0", "-", "-", "-", "-"] in table
    assert ["submodule", "12.00", "80.0", "50.0", "41.0", "3.0", "620", "33.0", "512"] in table


def test_a_pruning_has_two_rows_and_one_if_the_dense_model_was_not_measured() -> None:
    pruned = report("pruned", pruned_perplexity=None)
    assert [(row.scope, row.recovered) for row in with_references(pruned)] == [("dense", 1.0), ("pruned", 0.0)]
    assert with_references(pruned.replace(dense_perplexity=None)) == [pruned.replace(dense_perplexity=None)]


def test_memory_and_drift_of_one_row_need_verbose() -> None:
    drift = {"hidden": [0.1, 0.2], "kl": 0.5, "split": "validation", "num_sequences": 4, "seq_len": 8}
    rank = {"peak_host_bytes": 7, "baseline_host_bytes": 1, "weights_bytes": 1, "gradients_bytes": 1}
    cell = recovered(drift=drift, ranks=[rank | {"optimizer_bytes": 1}])
    brief = [" ".join(line) for line in lines(Results([cell]))]
    assert "submodule: KL from the dense model 0.5000 nats per token, on 4 validation sequences of 8 tokens" in brief
    assert not any("memory per process" in line or "drift:" in line for line in brief)
    whole = [" ".join(line) for line in lines(Results([cell]), verbose=True)]
    assert any("memory per process" in line for line in whole)
    assert any("drift:" in line for line in whole)


def saved(path: Path, *cells: Report) -> Path:
    if len(cells) == 1:
        cells[0].save(path / "report.json")
    else:
        Results(list(cells), name=path.name).save(path / "results.json")
    return path


def test_runs_comparisons_and_files_are_one_set(tmp_path: Path) -> None:
    first = saved(tmp_path / "one", recovered(run_dir="one"))
    second = saved(tmp_path / "two", recovered(run_dir="two", perplexity=13.0))
    comparison = saved(tmp_path / "all", report("dense"), report("pruned"), report("full"))
    results = collect([first, second / "report.json", comparison, first])
    assert sorted(cell.label for cell in results.cells) == [
        "dense",
        "full",
        "pruned",
        "submodule (one)",
        "submodule (two)",
    ]
    labels = [line[:2] for line in lines(results, together=True) if line]
    assert ["submodule", "(one)"] in labels


def test_directories_of_one_name_are_told_apart_by_their_parents(tmp_path: Path) -> None:
    paths = [saved(tmp_path / parent / "run", recovered(run_dir=parent)) for parent in ("a", "b")]
    assert [cell.label for cell in collect(paths).cells if cell.scope == "submodule"] == [
        "submodule (a/run)",
        "submodule (b/run)",
    ]


def test_different_models_and_patterns_have_columns_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = saved(tmp_path / "one", recovered())
    other = saved(tmp_path / "other", recovered(pattern="60% per row", dense_perplexity=10.0))
    assert main(["report", str(one), str(other)]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0] == "distilgpt2, wanda"
    rows = [line.split() for line in text.splitlines()]
    assert sum(row[:1] == ["dense"] for row in rows) == 1
    assert any(row[:2] == ["submodule", "2:4"] for row in rows)
    assert any(row[:4] == ["submodule", "60%", "per", "row"] for row in rows)
    assert max(map(len, text.splitlines())) <= 100
    assert main(["report", str(one), str(other), "--markdown"]) == 0
    assert "| scope | pattern | test perplexity |" in capsys.readouterr().out


def test_a_broken_file_is_named_with_its_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = saved(tmp_path / "good", recovered()), saved(tmp_path / "bad", recovered())
    payload = json.loads((bad / "report.json").read_text()) | {"seed": "x"}
    (bad / "report.json").write_text(json.dumps(payload))
    assert main(["report", str(good), str(bad)]) == 1
    error = capsys.readouterr().err
    assert f"{bad}/report.json is no valid report: `seed` must be a valid integer, got 'x' of type str" in error


def test_a_log_is_appended_and_names_the_error(tmp_path: Path) -> None:
    import logging

    logger = logging.getLogger("recon")
    handlers, level = list(logger.handlers), logger.level
    with log_to(tmp_path / "run" / "log.txt"):
        logger.info("window 1/2")
    with pytest.raises(ValueError, match="no room"), log_to(tmp_path / "run" / "log.txt"):
        raise ValueError("no room")
    logger.info("not in the file")
    first, said, second, error = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert first.startswith("--- 20")
    assert second.startswith("--- 20")
    assert (said, error) == ("window 1/2", "ValueError: no room")
    assert (logger.handlers, logger.level) == (handlers, level)
