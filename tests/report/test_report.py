import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from recon.report import SCOPES, Report, Results, markdown_table, print_table
from recon.report.groups import group_cells

PERPLEXITIES = {
    "dense": 10.0,
    "sparse": 10.5,
    "pruned": 20.0,
    "matrix": 14.0,
    "submodule": 12.0,
    "block": 11.5,
    "full": 21.0,
}


def report(scope: str = "block", **changes: Any) -> Report:
    values: dict[str, Any] = {
        "scope": scope,
        "model": "distilgpt2",
        "criterion": "wanda",
        "pattern": "2:4",
        "seed": 0,
        "perplexity": PERPLEXITIES[scope],
        "dense_perplexity": 10.0,
        "pruned_perplexity": 20.0,
        "sparsity": 0.5,
        "mask_violations": 0,
        "peak_host_bytes": 620 * 2**20,
        "seconds": 33.04,
        "train_tokens": 131_072,
        "run_dir": f"runs/demo/{scope}",
        "protocol": {"split": "test", "num_sequences": 64, "seq_len": 512, "tokens_scored": 32_704},
    }
    return Report(**(values | changes))


def failed(scope: str = "block", **changes: Any) -> Report:
    values = {
        "perplexity": None,
        "sparsity": None,
        "peak_host_bytes": None,
        "seconds": 0.0,
        "train_tokens": 0,
    }
    return report(scope, **(values | {"status": "failed", "error": "out of memory"} | changes))


def printed(results: Results, width: int = 80, verbose: bool = False) -> str:
    file = io.StringIO()
    print_table(results, Console(file=file, width=width), verbose)
    return file.getvalue()


# --- Report


def test_a_saved_report_comes_back_equal(tmp_path: Path) -> None:
    original = report(peak_device_bytes=7, environment={"torch": "2.13", "device": "cpu"})
    original.save(tmp_path / "run" / "report.json")
    assert Report.load(tmp_path / "run" / "report.json") == original
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["report.json"]


@pytest.mark.parametrize(("scope", "share"), [("dense", 1.0), ("pruned", 0.0), ("submodule", 0.8), ("full", -0.1)])
def test_recovered_is_the_closed_share_of_the_gap(scope: str, share: float) -> None:
    assert report(scope).recovered == pytest.approx(share)
    assert report(scope).to_dict()["recovered"] == pytest.approx(share)


def test_dense_and_pruned_are_their_own_references() -> None:
    assert report("dense", dense_perplexity=None).recovered == 1.0
    assert report("pruned", pruned_perplexity=None).recovered == 0.0


@pytest.mark.parametrize(
    "changes",
    [
        {"perplexity": None},
        {"dense_perplexity": None},
        {"pruned_perplexity": None},
        {"pruned_perplexity": 10.0},
    ],
)
def test_recovered_is_none_without_a_measured_gap(changes: dict[str, Any]) -> None:
    assert report(**changes).recovered is None


def test_json_is_strict(tmp_path: Path) -> None:
    original = report(perplexity=math.inf, sparsity=math.nan, protocol={"losses": [1.0, -math.inf]})
    assert original.perplexity is original.sparsity is None
    original.save(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["protocol"] == {"losses": [1.0, None]}
    assert Report.load(tmp_path / "report.json").perplexity is None


def test_a_report_is_frozen_and_a_changed_copy_is_validated() -> None:
    original = report("matrix")
    with pytest.raises(ValueError, match="frozen"):
        original.perplexity = 3.0  # pyright: ignore[reportAttributeAccessIssue]
    assert original.replace(seed=3) == report("matrix", seed=3)
    with pytest.raises(ValueError, match="seed"):
        original.replace(seed="3")


def test_peaks_go_by_name() -> None:
    assert report().peaks == {"host": 620 * 2**20, "device": None}
    assert report(peak_device_bytes=7).peaks["device"] == 7


def test_a_file_without_the_later_fields_still_loads(tmp_path: Path) -> None:
    payload = report().to_dict()
    for name in ("model_sparsity", "disk_bytes", "references"):
        del payload[name]
    (tmp_path / "report.json").write_text(json.dumps(payload))
    assert Report.load(tmp_path / "report.json") == report()


def test_the_label_defaults_to_the_scope() -> None:
    assert report("matrix").label == "matrix"
    assert report("block", label="block x2").label == "block x2"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scope": "layer"}, r"must be one of dense, .*, full .*input_value='layer'"),
        ({"status": "done"}, r"status\n  Input should be 'ok' or 'failed' .*input_value='done'"),
        ({"status": "failed"}, r"must say why"),
        ({"seconds": math.nan}, r"seconds\n  Input should be a finite number .*input_value=nan"),
    ],
)
def test_impossible_reports_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Report(**({"scope": "block", "model": "m", "criterion": "c", "pattern": "p", "seed": 0} | changes))


def test_from_dict_needs_only_what_has_no_default() -> None:
    payload = {"scope": "block", "model": "m", "criterion": "c", "pattern": "p", "seed": 0}
    assert Report.from_dict(payload) == Report(**payload)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"report: it lacks `seed`; "):
        Report.from_dict({key: payload[key] for key in payload if key != "seed"})


def test_whole_numbers_are_read_as_floats() -> None:
    # other JSON writers drop the ".0"
    again = Report.from_dict(report().to_dict() | {"perplexity": 12, "seconds": 3})
    assert isinstance(again.perplexity, float)
    assert isinstance(again.seconds, float)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"perplexty": 3.0}, "page.json is no valid report: `perplexty` is an unknown field"),
        (
            {"perplexity": "12"},
            "page.json .*`perplexity` must be a valid number, got '12' of type str",
        ),
        ({"seed": True}, "page.json .*`seed` must be a valid integer, got True of type bool"),
        ({"protocol": []}, "page.json .*`protocol` must be a valid dictionary"),
    ],
)
def test_from_dict_names_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        Report.from_dict(report().to_dict() | changes, source="page.json")
    assert len(str(raised.value).splitlines()) == 1


def test_every_fault_is_named_in_one_line() -> None:
    with pytest.raises(
        ValueError, match=r"^page\.json .*`seed`.*; `status` must be 'ok' or 'failed', got 1.*; `x` is"
    ) as raised:
        Report.from_dict(report().to_dict() | {"x": 1, "seed": None, "status": 1}, source="page.json")
    assert len(str(raised.value).splitlines()) == 1


# --- Results


def test_saved_results_come_back_equal_from_file_and_directory(tmp_path: Path) -> None:
    results = Results([report(scope) for scope in SCOPES], name="demo")
    results.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == results
    assert Results.load(str(tmp_path)) == results
    assert json.loads((tmp_path / "results.json").read_text())["cells"][3]["recovered"] == 0.6


def test_a_single_run_reads_as_results_of_one_cell(tmp_path: Path) -> None:
    report().save(tmp_path / "report.json")
    assert Results.load(tmp_path).cells == [report()]
    assert Results.load(tmp_path / "report.json").cells == [report()]


def test_missing_results_name_the_path_and_the_cure(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no .*results\.json and no .*report\.json.*Run `recon compare`"):
        Results.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"absent\.json.*Run `recon compare`"):
        Results.load(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "strict JSON"),
        ("[]", r"results\.json must hold a JSON object as recon writes it; got \[\] of type list"),
        ('{"cells": [NaN]}', "NaN is not strict JSON"),
        ('{"cells": [1]}', r"results.json .*`cells\[0\]` must be a valid dictionary .*, got 1"),
        ('{"cells": {}}', "results.json .*`cells` must be a valid list"),
        ('{"cells": [], "extra": 1}', "`extra` is an unknown field"),
        ('{"cells": [{"scope": "full"}]}', r"results.json .*lacks `cells\[0\].model`; .*`cells\[0\].seed`; "),
    ],
)
def test_broken_results_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Results.load(tmp_path)


# --- tables


def test_rows_are_sorted_and_numbers_are_those_of_the_cells() -> None:
    text = printed(Results([report(scope) for scope in reversed(SCOPES)]))
    rows = [line.split() for line in text.splitlines() if line.split() and line.split()[0] in SCOPES]
    assert [row[0] for row in rows if len(row) > 1] == list(SCOPES)
    assert ["submodule", "12.00", "80.0", "50.0", "620", "33.0", "131"] in rows
    assert "device" not in text
    assert "status" not in text


def test_seeds_are_averaged_with_their_sample_deviation() -> None:
    cells = [report(perplexity=value, seed=i, seconds=10.0 * i) for i, value in enumerate((11.0, 12.0, 13.0))]
    (row,) = [line.split() for line in printed(Results(cells)).splitlines() if line.startswith("block")]
    assert row == ["block", "12.00", "±", "1.00", "80.0", "±", "10.0", "50.0", "620", "10.0", "131", "3"]


def test_a_failed_seed_is_counted_and_explained_not_averaged() -> None:
    cells = [
        report(perplexity=11.0),
        report(perplexity=13.0, seed=1),
        failed(seed=2, error="no\nroom\n" * 99),
    ]
    text = printed(Results(cells))
    assert "12.00 ± 1.41" in text
    assert "2/3 ok" in text
    assert "block (seed 2) failed in runs/demo/block: no room no" in text
    assert len(text.splitlines()) < 14


def test_without_seeds_a_failed_row_says_so() -> None:
    text = printed(Results([report("matrix"), failed("full")]))
    (matrix,) = [line.split() for line in text.splitlines() if line.startswith("matrix")]
    (full,) = [line.split() for line in text.splitlines() if line.startswith("full ") and "seed" not in line]
    assert matrix[-1] == "ok"
    assert full[1:] == ["-"] * 4 + ["-"] * 2 + ["failed"]


@pytest.mark.parametrize("width", [40, 80])
def test_no_number_is_ever_cut_or_wrapped(width: int) -> None:
    cells = [report(scope, seed=seed, peak_device_bytes=9 * 2**30) for scope in SCOPES for seed in (0, 1)]
    cells.append(failed(label="block x16, recovered inputs", seed=0))
    text = printed(Results(cells), width)
    assert "…" not in text
    for scope in SCOPES:
        spread, seeds = ("", 1) if scope in ("dense", "sparse") else (r" ± 0\.00", 2)  # one run for all seeds
        expected = rf"^{scope} +{PERPLEXITIES[scope]:.2f}{spread} .* 50\.0 +9,216 +620 +33\.0 +131 +{seeds}\s*$"
        assert re.search(expected, text, re.MULTILINE), text


def test_the_widest_table_fits_100_columns() -> None:
    sizes = {"peak_device_bytes": 9 * 2**30, "model_sparsity": 0.4, "disk_bytes": 9 * 2**30}
    cells = [report(scope, seed=seed, **sizes) for scope in SCOPES for seed in (0, 1, 2)]
    cells.append(failed(seed=3))
    assert max(len(line) for line in printed(Results(cells)).splitlines()) <= 100


def test_each_group_is_a_section() -> None:
    text = printed(Results([report(), report(criterion="magnitude"), report(model="[bold]gpt2[/bold]")]))
    for title in ("distilgpt2, wanda, 2:4", "distilgpt2, magnitude, 2:4", "[bold]gpt2[/bold], wanda, 2:4"):
        assert title in text.splitlines()


def test_markdown_holds_the_strings_of_the_printed_table() -> None:
    results = Results([report(scope, label=f"{scope} | x") for scope in SCOPES] + [failed(label="block x9")])
    text = markdown_table(results)
    assert "| submodule \\| x | 12.00 | 80.0 | 50.0 | 620 | 33.0 | 131 | ok |" in text.splitlines()
    rows = [re.split(r"(?<!\\)\|", line) for line in text.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows} == {10}
    assert len(rows) == 2 + len(SCOPES) + 1
    assert "- block x9 (seed 0) failed in runs/demo/block: out of memory" in text


def test_ascii_consoles_get_ascii() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_table(Results([report(), report(seed=1)]), Console(file=file, width=80))
    file.seek(0)
    assert "11.50 +- 0.00" in file.read()


@pytest.mark.parametrize(
    ("change", "remark"),
    [
        ({"mask_violations": 1200}, r"violates its masks: 1,200 pruned weights are not zero"),
        (
            {"windows": {"000": {"before": 0.2, "after": 0.1}, "001": {"before": 0.2, "after": 0.2, "discarded": 3.0}}},
            r"full \(seed 0\): 1 of 2 windows ended worse than they began and kept their start, for want of text",
        ),
        ({"protocol": {"split": "test", "seq_len": 128}}, r"not comparable: their protocols differ"),
        ({"perplexity": math.inf}, r"full \(seed 0\) has no finite perplexity"),
        ({"baseline_host_bytes": 412 * 2**20}, r"Host peaks include 412 MiB of libraries"),
    ],
)
def test_what_numbers_hide_is_remarked(change: dict[str, Any], remark: str) -> None:
    assert re.search(remark, markdown_table(Results([report(), report("full", **change)])))
    assert not re.search(remark, markdown_table(Results([report(), report("full")])))


def test_a_seed_is_not_counted_twice() -> None:
    with pytest.raises(ValueError, match=r"block \(seed 0\) twice, in 'a' and in 'b'"):
        group_cells(Results([report(run_dir="a"), report(run_dir="b")]))


def test_importing_the_package_is_light() -> None:
    heavy = ("torch", "lightning", "matplotlib", "transformers")
    code = f"import sys, recon.report; print([name for name in {heavy} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


# --- memory on the device


def tracked(mib: float) -> list[dict[str, Any]]:
    """Two processes of a run; the first has most."""
    sizes = {"weights": int(mib * 2**20) - 2**20, "calibration": 2**20}
    smaller = {"device": {name: size // 2 for name, size in sizes.items()}}
    return [{"tracked": {"device": sizes, "host": {"calibration": 99 * 2**20}}}, {"tracked": smaller}, {}]


def test_the_table_has_the_live_tensors_of_the_device_beside_the_host() -> None:
    results = Results([report("pruned"), report("submodule", ranks=tracked(14.25)), report("full", ranks=tracked(107))])
    text = printed(results)
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert [rows[name][4:6] for name in ("pruned", "submodule", "full")] == [
        ["-", "620"],
        ["14.2", "620"],
        ["107.0", "620"],
    ]
    assert "Peak device: live tensors that would be on a device, if there were one" in text
    cuda = printed(Results([report("submodule", ranks=tracked(14), peak_device_bytes=15 * 2**20)]))
    assert re.search(r"^submodule .* 14\.0 +15 +620 ", cuda, re.MULTILINE)
    assert "Peak device: live tensors on the device, measured" in cuda


# --- memory per process


def process(*split: int, host: int = 0, device: int | None = None, on_host: int | None = None) -> dict[str, Any]:
    """One of a report's `ranks`, in MiB: weights, gradients and optimizer state if measured; 400 of libraries."""
    device_bytes = None if device is None else device * 2**20
    sizes = {"peak_host_bytes": (400 + host) * 2**20, "peak_device_bytes": device_bytes}
    names = ("weights_bytes", "gradients_bytes", "optimizer_bytes", "on_host_bytes")
    parts = (*split, sum(split) if on_host is None else on_host) if split else (None,) * 4
    measured = {name: part and part * 2**20 for name, part in zip(names, parts, strict=True)}
    return {**sizes, "baseline_host_bytes": 400 * 2**20, **measured}


def sharded(strategy: str, *ranks: dict[str, Any], seed: int = 0, **changes: Any) -> Report:
    label = f"full, {strategy}"
    return report("full", label=label, seed=seed, environment={"strategy": strategy}, ranks=list(ranks), **changes)


def memory_rows(results: Results, width: int = 80) -> list[str]:
    """The second table's lines, each with its runs of spaces folded."""
    lines = printed(results, width, verbose=True).split("memory per process (MiB)\n")[1].splitlines()
    return [" ".join(line.split()) for line in lines]


def test_memory_per_process_is_the_largest_over_ranks_and_the_mean_over_seeds() -> None:
    first = sharded("zero1", process(12, 6, 18, host=80), process(12, 7, 18, host=90))
    second = sharded("zero1", process(12, 6, 20, host=80), process(12, 7, 20, host=100), seed=1)
    local = report("block", environment={"strategy": "single_device"}, ranks=[process(12, 2, 4, host=1300)])
    exact = report("matrix", environment={"strategy": "single_device"}, ranks=[process(host=60)])
    results = Results([first, second, local, exact, report("dense")])
    rows = memory_rows(results)
    assert "full, zero1 2 zero1 12.0 7.0 19.0 57.0 95.0" in rows
    assert "block 1 single_device 12.0 2.0 4.0 1,282 1,300" in rows
    assert "matrix 1 single_device - - - - 60.0" in rows
    assert not any(row.startswith("dense") for row in rows)
    assert max(len(line) for line in printed(results).splitlines()) <= 80


def test_on_a_device_the_offloaded_part_is_not_in_its_peak() -> None:
    resident = sharded("zero2", process(10, 5, 30, host=900, device=100, on_host=0))
    assert "full, zero2 1 zero2 10.0 5.0 30.0 55.0 100.0" in memory_rows(Results([resident]))
    offloaded = sharded("zero2_offload", process(10, 5, 30, host=900, device=40, on_host=35))
    rows = memory_rows(Results([resident, offloaded]), 100)
    assert "full, zero2 1 zero2 10.0 5.0 30.0 55.0 100.0 0.0" in rows
    assert "full, zero2_offload 1 zero2_offload 10.0 5.0 30.0 30.0 40.0 35.0" in rows
    on_host = sharded("ddp", process(10, 5, 30, host=900, device=0))
    assert "full, ddp 1 ddp 10.0 5.0 30.0 855.0 - -" in memory_rows(Results([offloaded, on_host]))
    assert "what is offloaded to the host is part of the first three, and not of the peak" in rows


def test_what_is_not_known_of_a_split_is_not_made_up() -> None:
    ranks = process(10, 5, 30, host=900), process(10, 5, 30, host=900, device=100, on_host=0)
    for rank in ranks:
        del rank["on_host_bytes"]
    assert "full, ddp 1 ddp 10.0 5.0 30.0 855.0 900.0" in memory_rows(Results([sharded("ddp", ranks[0])]))
    assert "full, ddp 1 ddp 10.0 5.0 30.0 - 100.0" in memory_rows(Results([sharded("ddp", ranks[1])]))


def test_memory_per_process_is_a_table_of_markdown_too() -> None:
    results = Results([sharded("fsdp2", process(6, 6, 12, host=50), process(6, 6, 12, host=40))])
    assert "memory" not in markdown_table(results)
    text = markdown_table(results, verbose=True)
    title, table = text.split("\n\n")[-3:-1]
    assert title == "**memory per process (MiB)**"
    header, _, row = table.splitlines()
    assert header == (
        "| scope | processes | strategy | weights | gradients | optimizer | other | peak above libraries |"
    )
    assert row == "| full, fsdp2 | 2 | fsdp2 | 6.0 | 6.0 | 12.0 | 26.0 | 50.0 |"


@pytest.mark.parametrize("ranks", [[], [{}], [process(host=60)], [{"peak_host_bytes": 7, "baseline_host_bytes": None}]])
def test_without_a_split_there_is_no_second_table(ranks: list[dict[str, Any]]) -> None:
    assert "memory per process" not in printed(Results([report(ranks=ranks)]), verbose=True)
