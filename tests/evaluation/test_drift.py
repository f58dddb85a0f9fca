"""Drift from the dense model: the measurement, its place in a report, its table and its picture."""

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.utils.data import DataLoader

from recon.cli import main
from recon.evaluation.drift import measure_drift
from recon.report import Report, Results, draw_drift, markdown_table
from recon.report.drift import evenly_spaced, percent
from recon.report.estimates import Estimate
from recon.report.groups import group_cells
from recon.report.looks import LOOKS
from recon.report.plots.drift import draw_depth
from recon.report.plots.style import plain_style
from recon.report.table import table_sections
from tests.support.families import FAMILIES, VOCABULARY, tiny, token_ids
from tests.support.scope_fixtures import random_masks
from tests.support.shapes import LLAMA, random_model


def batches(ids: torch.Tensor, batch_size: int) -> DataLoader:
    return DataLoader([{"input_ids": row} for row in ids], batch_size=batch_size)  # pyright: ignore[reportArgumentType]


def pruned(family: str, **options: Any) -> Any:
    model = tiny(family, **options)
    random_masks(model).apply(model)
    return model


def by_hand(dense: Any, other: Any, ids: torch.Tensor) -> tuple[list[float], float]:
    """One sequence and one token at a time, fp64, from the hidden states that the model itself hands out."""
    errors, energies, divergences = [0.0] * 99, [0.0] * 99, []
    for sequence in ids:
        with torch.no_grad():
            a, b = (model(input_ids=sequence[None], output_hidden_states=True) for model in (dense, other))
        # the last one handed out has been through the final norm, so it is taken from a hook below
        states = [[*out.hidden_states[1:-1], last(model, sequence)] for out, model in ((a, dense), (b, other))]
        for block, (h, g) in enumerate(zip(*states, strict=True)):
            errors[block] += float((g[0].double() - h[0].double()).square().sum())
            energies[block] += float(h[0].double().square().sum())
        for p, q in zip(a.logits[0].double()[:-1], b.logits[0].double()[:-1], strict=True):
            p, q = p.softmax(0), q.softmax(0)
            divergences.append(float((p * (p / q).log()).sum()))
    hidden = [error / energy for error, energy in zip(errors, energies, strict=True) if energy]
    return hidden, math.fsum(divergences) / len(divergences)


def last(model: Any, sequence: torch.Tensor) -> torch.Tensor:
    outputs: list[Any] = []
    (blocks,) = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3]
    with torch.no_grad(), blocks[-1].register_forward_hook(lambda module, args, output: outputs.append(output)):
        model(input_ids=sequence[None])
    return outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]


# --- the measurement


@pytest.mark.parametrize("family", FAMILIES)
def test_is_what_the_hidden_states_and_logits_say(family: str) -> None:
    dense, other, ids = tiny(family), pruned(family), token_ids(batch=3, seq=9)
    drift = measure_drift(dense, other, batches(ids, 2))
    hidden, kl = by_hand(dense, other, ids)
    assert drift.hidden == pytest.approx(hidden, rel=1e-4)
    assert drift.kl == pytest.approx(kl, rel=1e-4)
    assert len(hidden) == 3
    assert min(*hidden, kl) > 1e-4  # so that the tolerance means something
    assert (drift.split, drift.num_sequences, drift.seq_len) == ("validation", 3, 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_has_no_drift_from_itself(dtype: torch.dtype) -> None:
    one, same = tiny("llama"), tiny("llama")
    for model in (one, same):
        torch.nn.Module.to(model, dtype)
    drift = measure_drift(one, same, batches(token_ids(), 2))
    assert drift.hidden == [0.0, 0.0, 0.0]
    assert drift.kl == 0.0


def test_a_block_passes_its_error_on_and_the_first_ones_have_none() -> None:
    dense, other = tiny("llama"), tiny("llama")
    with torch.no_grad():
        other.get_parameter("model.layers.1.mlp.down_proj.weight").mul_(1.5)
    drift = measure_drift(dense, other, batches(token_ids(), 1))
    assert drift.hidden[0] == 0.0
    assert min(drift.hidden[1:]) > 0
    assert drift.kl > 0


def test_a_ragged_last_batch_counts_every_token_the_same() -> None:
    dense, other, ids = tiny("gpt2"), pruned("gpt2"), token_ids(batch=5)
    whole, ragged = (measure_drift(dense, other, batches(ids, size)) for size in (5, 3))
    assert ragged.hidden == pytest.approx(whole.hidden, rel=1e-5)
    assert ragged.kl == pytest.approx(whole.kl, rel=1e-5)


def test_leaves_no_hook_and_no_gradient() -> None:
    dense, other = tiny("llama"), pruned("llama")
    measure_drift(dense, other, batches(token_ids(), 2))
    for model in (dense, other):
        assert not any(module._forward_hooks for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("broken", "name"), [(0, "the dense model"), (1, "the recovered model")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_names_block_and_batch(broken: int, name: str, value: float) -> None:
    models, ids = [tiny("llama", tie_word_embeddings=False), tiny("llama", tie_word_embeddings=False)], token_ids(4)
    ids = ids.clamp(max=VOCABULARY - 2)
    ids[3, 3] = VOCABULARY - 1
    with torch.no_grad():
        models[broken].get_input_embeddings().get_parameter("weight")[VOCABULARY - 1] = value
    with pytest.raises(FloatingPointError, match=rf"after model.layers.0 of {name}, validation batch 1"):
        measure_drift(models[0], models[1], batches(ids, 2))


def test_logits_that_are_no_numbers_name_the_batch() -> None:
    other = tiny("llama", tie_word_embeddings=False)
    with torch.no_grad():
        other.get_parameter("lm_head.weight")[0] = math.nan
    with pytest.raises(FloatingPointError, match=r"logits must be finite, .* in held-out batch 0"):
        measure_drift(tiny("llama"), other, batches(token_ids(), 2), "held-out")


def test_models_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match=r"same depth, got 3 dense blocks and 2 recovered"):
        measure_drift(tiny("llama"), tiny("llama", num_hidden_layers=2), batches(token_ids(), 2))
    twice = tiny("llama")
    inner: Any = twice.get_submodule("model.layers.1")
    run = inner.forward
    inner.forward = lambda *args, **kwargs: twice.get_submodule("model.layers.2")(run(*args, **kwargs), **kwargs)
    with pytest.raises(ValueError, match=r"model.layers.2 was called 2 times; leave it out with --drift false"):
        measure_drift(tiny("llama"), twice, batches(token_ids(), 2))


# --- the report


def cell(scope: str, hidden: list[float], kl: float = 0.5, seed: int = 0, **changes: Any) -> Report:
    drift = {"hidden": hidden, "kl": kl, "split": "validation", "num_sequences": 16, "seq_len": 256} if hidden else {}
    values = {"model": "distilgpt2", "criterion": "wanda", "pattern": "2:4", "drift": drift}
    return Report(scope=scope, seed=seed, **(values | changes))


def comparison(depth: int = 6, seeds: int = 1) -> list[Report]:
    """Six scopes; submodule and block nearly coincide."""
    levels = {"pruned": 0.05, "matrix": 0.01, "submodule": 0.006, "block": 0.0058, "full": 0.03}
    measured = [
        cell(scope, [level * (1 + block) * (1 + seed / 10) for block in range(depth)], 10 * level + seed, seed)
        for scope, level in levels.items()
        for seed in range(seeds)
    ]
    return [*(cell("dense", [], seed=seed) for seed in range(seeds)), *measured]


def section_of(cells: list[Report]) -> Any:
    (found,) = [section for section in table_sections(Results(cells)) if section.title.startswith("drift")]
    return found


def test_a_report_with_drift_comes_back_equal(tmp_path: Path) -> None:
    report = cell("block", [1e-4, 0.25], 0.125)
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report
    assert json.loads((tmp_path / "report.json").read_text())["drift"]["hidden"] == [1e-4, 0.25]


def test_the_table_has_every_measured_row_and_every_block() -> None:
    section = section_of(comparison())
    assert section.header == ["scope", "KL (nats/token)", *(f"block {i}" for i in range(6))]
    assert [row[0] for row in section.rows] == ["pruned", "matrix", "submodule", "block", "full"]
    assert section.rows[1] == ["matrix", "0.1000", "1.00", "2.00", "3.00", "4.00", "5.00", "6.00"]
    assert "16 validation sequences of 256 tokens" in " ".join(section.notes)


def test_seeds_are_averaged_and_only_the_kl_has_a_spread() -> None:
    section = section_of(comparison(depth=2, seeds=3))
    assert section.rows[1] == ["matrix", "1.1000 ± 1.0000", "1.10", "2.20"]


def test_a_deep_model_shows_eight_blocks_and_fits_80_columns() -> None:
    section = section_of(comparison(depth=32, seeds=3))
    assert [name.removeprefix("block ") for name in section.header[2:]] == ["0", "4", "9", "13", "18", "22", "27", "31"]
    assert sum(max(len(word) for row in section.rows for word in [row[i]]) + 1 for i in range(10)) <= 81


@pytest.mark.parametrize("depth", [1, 2, 7, 8, 9, 15, 32, 80, 126])
def test_blocks_are_evenly_spaced_with_first_and_last(depth: int) -> None:
    chosen = evenly_spaced(depth, 8)
    assert (chosen[0], chosen[-1], len(chosen)) == (0, depth - 1, min(depth, 8))
    steps = {b - a for a, b in itertools.pairwise(chosen)}
    assert not steps or (min(steps) >= 1 and max(steps) - min(steps) <= 1)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (1e-4, "0.0100"),
        (1.234e-4, "0.0123"),
        (0.05678, "5.68"),
        (0.9996, "100"),
        (1.0, "100"),
        (12.5, "1,250"),
        (1e-9, "1.0e-07"),
        (4e4, "4.0e+06"),
        (0.0, "0.00"),
        (None, "-"),
    ],
)
def test_percent_can_be_read_over_many_orders(error: float | None, text: str) -> None:
    assert percent(None if error is None else Estimate(error, None)) == text


def test_without_drift_there_is_no_table_and_no_picture(tmp_path: Path) -> None:
    bare = [cell("dense", []), cell("block", []), cell("full", [], status="failed", error="out of memory")]
    assert "drift" not in markdown_table(Results(bare))
    assert draw_drift(Results(bare), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


# --- the picture


def drawn(cells: list[Report]) -> Figure:
    (group,) = group_cells(Results(cells))
    with plain_style():
        figure = draw_depth(group)
        assert figure is not None
        FigureCanvasAgg(figure).draw()
    return figure


def many(names: list[str], error: float = 0.01) -> list[Report]:
    return [cell("block", [error, 2 * error], label=name) for name in names]


PICTURES = {
    "comparison": comparison(),
    "seeds": comparison(seeds=3),
    "deep": comparison(depth=80, seeds=2),
    "one block": comparison(depth=1),
    "all coincide": many([f"block x{n}" for n in range(1, 13)]),
    "forty rows": many([f"block x{n}" for n in range(1, 41)]),
    "a long label": [*comparison(), *many(["block " + "of a very long description " * 9])],
    "tiny errors": many(["block"], 1e-12),
    "huge errors": many(["block"], 1e9),
    "spread beyond the mean": [cell("block", [value, value], seed=i) for i, value in enumerate((1e-4, 1.0))],
    "some errors are zero": [*comparison(depth=3), cell("block", [0.0, 0.0, 0.02], label="later blocks only")],
}


@pytest.mark.parametrize("case", PICTURES)
def test_every_row_is_named_once_beside_the_lines_in_the_order_of_their_ends(case: str) -> None:
    figure = drawn(PICTURES[case])
    (axes,), (legend,) = figure.axes, figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    expected = {report.label for report in PICTURES[case] if report.drift}
    assert {name.partition("  KL ")[0][:30] for name in names} == {label[:30] for label in expected}
    assert len(names) == len(set(names))
    box = legend.get_window_extent()
    assert axes.bbox.x1 < box.x0
    assert box.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= box.y0
    assert box.y1 <= figure.bbox.y1
    assert axes.get_window_extent().width > 0.3 * figure.bbox.width
    ends = [float(np.asarray(line.get_ydata())[-1]) for line in axes.lines]
    by_label = dict(zip([str(line.get_label()) for line in axes.lines], ends, strict=True))
    found = [by_label[label] for name in names for label in by_label if label[:30] == name.partition("  KL ")[0][:30]]
    assert found == sorted(ends, reverse=True)
    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
    assert len(ticks) >= 2


def test_lines_are_the_means_in_percent_with_the_scopes_looks() -> None:
    (axes,) = drawn(comparison(seeds=3)).axes
    assert axes.get_yscale() == "log"
    lines = {line.get_color(): line for line in axes.lines}
    assert len(lines) == 5
    for scope, level in (("matrix", 0.01), ("full", 0.03)):
        line = lines[LOOKS[scope].color]
        assert line.get_marker() == LOOKS[scope].marker
        assert np.asarray(line.get_xdata()).tolist() == list(range(6))
        assert np.asarray(line.get_ydata()) == pytest.approx([110 * level * (1 + block) for block in range(6)])
    assert len(axes.collections) == 5  # bands
    assert not drawn(comparison()).axes[0].collections


def test_rows_of_one_scope_have_different_lines() -> None:
    (axes,) = drawn(many(["block", "block x2", "block x3"])).axes
    dashes = {str(line._dash_pattern) for line in axes.lines}  # pyright: ignore
    assert len(dashes) == 3


def test_notes_say_what_is_left_out() -> None:
    lost = cell("full", [], status="failed", error="out of memory", label="full, long")
    zero = cell("block", [0.0, 0.02])
    shown = " ".join(text.get_text() for text in drawn([zero, lost]).texts)
    for fact in ("distilgpt2", "criterion wanda", "pattern 2:4", "validation split", "1 seed", "exactly 0"):
        assert fact in shown
    assert "Left out: full, long (seed 0) failed: out of memory" in shown
    assert "exactly 0" not in " ".join(text.get_text() for text in drawn(comparison()).texts)


def test_nothing_but_zeros_is_no_picture(tmp_path: Path) -> None:
    assert draw_drift(Results([cell("block", [0.0, 0.0], 0.0)]), tmp_path) == []


def test_files_are_named_as_the_pareto_pictures_and_deterministic(tmp_path: Path) -> None:
    first = draw_drift(Results(comparison()), tmp_path / "a")
    second = draw_drift(Results(comparison()), tmp_path / "b")
    assert [path.name for path in first] == ["drift.png", "drift.svg"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    groups = [*comparison(), *(cell("block", [0.1], criterion="ria"),)]
    names = [path.name for path in draw_drift(Results(groups), tmp_path) if path.suffix == ".png"]
    assert names == ["drift-distilgpt2-wanda-2-4.png", "drift-distilgpt2-ria-2-4.png"]


# --- through the commands

DATA = ["--data.num_sequences=16", "--data.seq_len=64", "--data.num_validation=4", "--data.num_test=4"]
RANDOM = [*random_model(LLAMA), *DATA]


def test_fit_and_prune_measure_it_and_its_phase_is_no_recovery(tmp_path: Path, capsys: Any) -> None:
    run, cut = tmp_path / "run", tmp_path / "cut"
    profiler = ["--trainer.callbacks+=callbacks.MemoryProfiler"]
    options = ["--baselines=false", "--verbose", *profiler, *DATA]
    assert main(["fit", "-c", "scopes/matrix", "--run_dir", str(run), *options]) == 0
    assert re.search(r"drift: relative squared error of the hidden state", capsys.readouterr().out)
    assert main(["prune", "--run_dir", str(cut), *DATA]) == 0
    recovered, before = (Report.load(path / "report.json").drift for path in (run, cut))
    for drift in (recovered, before):
        assert len(drift["hidden"]) == 6
        assert (drift["split"], drift["num_sequences"], drift["seq_len"]) == ("validation", 4, 64)
    assert all(ours < theirs for ours, theirs in zip(recovered["hidden"], before["hidden"], strict=True))
    assert 0 < recovered["kl"] < before["kl"]
    assert "drift" in [phase["phase"] for phase in json.loads((run / "memory.json").read_text())["phases"]]


def test_drift_can_be_left_out_and_does_not_decide_what_a_run_is(tmp_path: Path) -> None:
    for command in (["prune"], ["fit", "-c", "scopes/matrix", "--baselines=false"]):
        run = tmp_path / command[0]
        assert main([*command, "--run_dir", str(run), "--drift=false", *RANDOM]) == 0
        assert Report.load(run / "report.json").drift == {}
        assert main([*command, "--run_dir", str(run), *RANDOM]) == 0


def test_a_model_that_is_not_pruned_has_none(tmp_path: Path) -> None:
    args = ["fit", "-c", "scopes/full", "--criterion=null", "--pattern=null", "--model.epochs=1"]
    assert main([*args, "--run_dir", str(tmp_path / "run"), *RANDOM]) == 0
    assert Report.load(tmp_path / "run" / "report.json").drift == {}
