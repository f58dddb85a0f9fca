"""Scores on tasks in reports, tables and cards: means, standard errors, distances to the dense model."""

from typing import Any

import pytest

from recon.report import Report, Results, markdown_table, with_references
from recon.report.card import card
from tests.report.test_card import facts
from tests.report.test_report import printed, report


def score(value: float | None, stderr: float | None = 0.03, **changes: Any) -> dict[str, Any]:
    metrics = {"acc": {"value": value, "stderr": stderr}, "acc_norm": {"value": 0.9, "stderr": 0.1}}
    return {"main": "acc", "metrics": metrics, "num_documents": 50, "num_fewshot": 0, "version": "1"} | changes


def scored(scope: str, a: float, b: float | None = None, **changes: Any) -> Report:
    def both(a: float, b: float | None) -> dict[str, Any]:
        return {"one": score(a)} | ({} if b is None else {"two": score(b, 0.04)})

    references = {"dense": {"tasks": both(0.8, None if b is None else 0.6)}}
    return report(scope, tasks=both(a, b), references=references, **changes)


def rows(results: Results, title: str) -> dict[str, list[str]]:
    """First cell -> the others, of the table under a title of the markdown page."""
    lines = markdown_table(results).partition(f"**{title}**")[2].strip().partition("\n\n")[0].splitlines()
    return {cells[0]: cells[1:] for line in lines for cells in [[one.strip() for one in line.strip("|").split("|")]]}


def test_the_mean_counts_each_task_once_and_knows_its_error():
    cell = scored("block", 0.7, 0.5)
    assert cell.task_mean == pytest.approx({"value": 0.6, "stderr": 0.025, "delta": -0.1})
    assert cell.task_deltas == pytest.approx({"one": -0.1, "two": -0.1})
    assert scored("dense", 0.8, 0.6).task_mean == pytest.approx({"value": 0.7, "stderr": 0.025, "delta": 0.0})
    assert report("block").task_mean is None
    assert report("block", tasks={"one": score(None)}).task_mean is None
    assert report("block", tasks={"one": score(0.5, None)}).task_mean == {"value": 0.5, "stderr": None, "delta": None}


def test_scores_asked_otherwise_are_not_compared():
    cell = scored("block", 0.7).replace(tasks={"one": score(0.7, num_documents=49)})
    assert cell.task_deltas == {}
    assert cell.task_mean is not None
    assert cell.task_mean["delta"] is None
    text = markdown_table(Results([scored("dense", 0.8), cell]))
    assert "The scores on one are not comparable: they were measured differently" in text


def test_computed_numbers_are_written_and_computed_anew(tmp_path):
    cell = scored("block", 0.7, 0.5)
    cell.save(tmp_path / "report.json")
    assert cell.to_dict()["task_deltas"] == cell.task_deltas
    assert cell.to_dict()["task_mean"] == cell.task_mean
    assert Report.load(tmp_path / "report.json") == cell
    with pytest.raises(ValueError, match=r"`tasks` is not as recon writes it: `one.metrics`"):
        report("block", tasks={"one": {"main": "acc", "metrics": 3, "num_documents": 1, "num_fewshot": 0}})


def test_a_single_task_has_a_column_and_a_table():
    results = Results([scored("dense", 0.8), scored("block", 0.7)])
    assert "| block | 11.50 | 85.0 | 70.0 ± 3.0 |" in markdown_table(results)
    assert rows(results, "tasks") == {
        "scope": ["one acc (%)"],
        ":--": ["--:"],
        "dense": ["80.0 ± 3.0"],
        "block": ["70.0 ± 3.0 (-10.0)"],
    }
    assert "one 50 documents, 0-shot" in printed(results)
    assert "tasks" not in markdown_table(Results([report("block")]))


def test_several_tasks_have_a_mean_and_seeds_are_averaged():
    results = Results([scored("dense", 0.8, 0.6), scored("block", 0.7, 0.5), scored("block", 0.6, 0.4, seed=1)])
    table = rows(results, "tasks")
    assert table["scope"] == ["one acc (%)", "two acc (%)", "mean (%)"]
    assert table["block"] == ["65.0 ± 3.0 (-15.0)", "45.0 ± 4.0 (-15.0)", "55.0 ± 2.5 (-15.0)"]
    assert "mean of 2 tasks (%)" in markdown_table(results)


def test_the_models_that_a_run_was_compared_with_have_rows():
    references = {"dense": {"tasks": {"one": score(0.8)}}, "pruned": {"tasks": {"one": score(0.4)}}}
    cell = report("block", tasks={"one": score(0.7)}, references=references)
    dense, pruned, own = with_references(cell)
    assert [one.task_deltas.get("one") for one in (dense, pruned, own)] == pytest.approx([0.0, -0.4, -0.1])
    plain = report("block", tasks={"one": score(0.7)})
    assert [one.tasks for one in with_references(plain)] == [{}, {}, plain.tasks]


def test_a_card_has_the_scores():
    references = {"dense": {"tasks": {"one": score(0.8)}}}
    text = str(card(facts(tasks={"one": score(0.7)}, references=references)))
    assert "| one | acc | 70.00% ± 3.00% | -10.00% |" in text
    assert "type: acc\n      value: 0.7" in text
    assert "## Tasks" not in str(card(facts()))
