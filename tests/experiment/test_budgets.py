"""Equal budgets of a comparison, with a plan that is made up, and with the real one of a tiny model."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from recon.cli.compare import parsed
from recon.cli.costs import SPEEDS, Costs
from recon.cli.resolver import CommandResolver
from recon.experiment.comparison.budgets import Budgets
from recon.experiment.comparison.entry import Entry
from recon.experiment.comparison.resolver import Quantity, Resolver
from recon.experiment.comparison.spec import Comparison, Group, plan
from recon.planner.flops import KINDS
from recon.planner.prediction import predict
from tests.support.shapes import LLAMA

DATA = {"num_sequences": 8, "seq_len": 16, "num_validation": 2, "num_test": 4}
RANDOM = {"name": "random", "shape": LLAMA}
FAST = {"model.lr": 0.01}


class MadeUp(Resolver):
    """A plan in which an epoch costs 10, and 3 more with the word `dear`."""

    def describe(self, kind: type, spec: dict[str, Any]) -> str:
        return ""

    def resolved(self, command: list[str]) -> Any:
        return {}

    def cost(self, command: list[str], quantity: Quantity) -> float:
        (epochs,) = (int(one.partition("=")[2]) for one in command if one.startswith("--model.epochs="))
        return epochs * self._epoch(command)

    def within(self, command: list[str], quantity: Quantity, limit: float) -> tuple[dict[str, int], float] | None:
        if "scopes/matrix" in command:
            raise ValueError("it has no epochs")
        epochs = int(limit // self._epoch(command))
        return ({"model.epochs": epochs}, epochs * self._epoch(command)) if epochs else None

    def _epoch(self, command: list[str]) -> float:
        return 13.0 if any("dear" in one for one in command) else 10.0


def budgets(*entries: Entry, to: str | None = None) -> Budgets:
    def command_of(entry: Entry, chosen: dict[str, Any]) -> list[str]:
        return [*entry.config, *(f"--{name}={value}" for name, value in (entry.options | chosen).items())]

    return Budgets("flops", to, entries, command_of, MadeUp())


def test_the_dearest_or_the_named_recovery_has_the_budget() -> None:
    short, long = Entry("block", options={"model.epochs": 2}), Entry("full", options={"model.epochs": 5})
    tuned = Entry("submodule", options={"model.epochs": 4}, tune={"kind": ["cheap", "dear"]})
    assert budgets(short, long, tuned).limit == (52.0, "submodule")
    assert budgets(short, long, tuned, to="block").limit == (20.0, "block")
    left_out = Entry("submodule", options={"model.epochs": 9}, matched=False)
    assert budgets(short, long, left_out).limit == (50.0, "full")


def test_a_recovery_trains_as_long_as_the_budget_allows_and_tells_what_it_uses() -> None:
    block, full = (
        Entry("block", options={"model.epochs": 2, "kind": "dear"}),
        Entry("full", options={"model.epochs": 5}),
    )
    matched = budgets(block, full)
    told = {"quantity": "flops", "limit": 50.0, "of": "full"}
    assert matched.of(full, {}) == {**told, "planned": 50.0, "options": {}}
    assert matched.of(block, {}) == {**told, "planned": 39.0, "options": {"model.epochs": 3}}
    as_it_is = Entry("matrix", options={"model.epochs": 1}, matched=False)
    assert budgets(as_it_is, full).of(as_it_is, {}) == {**told, "planned": 10.0, "options": {}}


def test_what_cannot_be_matched_is_refused_with_the_cure() -> None:
    matrix, full = Entry("matrix", options={"model.epochs": 1}), Entry("full", options={"model.epochs": 1})
    with pytest.raises(
        ValueError, match=r"epochs or steps to choose: it has no epochs; give 'matrix' `matched: false`"
    ):
        budgets(matrix, full, to="full").of(matrix, {})
    dear = Entry("block", options={"model.epochs": 2, "kind": "dear"})
    with pytest.raises(ValueError, match=r"one epoch or step at least, got 10, that of 'full'; name .* as match_to"):
        budgets(dear, full, to="full").of(dear, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"match_to": "block"}, "match_to needs `match` and the title of a recovery, block, full, got 'block' with"),
        ({"match": "flops", "match_to": "all"}, "the title of a recovery, block, full, got 'all'"),
        (
            {"resample": True, "data": {}},
            "resample needs data.num_test, a number of test sequences to choose, got None",
        ),
    ],
)
def test_contradictory_comparisons_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Comparison("x", [Entry("block"), Entry("full")], **options)


def test_lengths_are_matched_or_tuned() -> None:
    entry = Entry("block", tune={"model.epochs": [1, 2]})
    with pytest.raises(ValueError, match=r"match decides how long 'block' trains, got model\.epochs to tune"):
        Comparison("x", [entry, Entry("full")], match="flops")
    Comparison("x", [Entry("block", tune=entry.tune, matched=False), Entry("full")], match="flops")
    with pytest.raises(ValueError, match="needs a recovery with `matched: true`"):
        Comparison("x", [Entry("block", matched=False)], match="flops")
    with pytest.raises(ValueError, match="labels of recoveries that differ, got 'block' twice"):
        Comparison("x", [Entry("block"), Entry("block")], match="flops")


def planned(tmp_path: Path, recoveries: list[Entry], **options: Any) -> list[Group]:
    comparison = Comparison(
        "x", recoveries, models=[RANDOM], data=DATA, directory=str(tmp_path), options=FAST, **options
    )
    groups = list(plan(comparison, RANDOM, CommandResolver(tmp_path)))
    num = {cell.directory for group in groups for cell in (group.dense, group.pruned)}
    num |= {group.recovery(entry, {}).directory for group in groups for entry in recoveries}
    assert len(num) == comparison.num_cells
    return groups


def test_epochs_and_steps_follow_from_the_plan(tmp_path: Path) -> None:
    """Exact starts and Gram matrices are in it; a step more would be over the budget."""
    block, full = Entry("block", options={"model.epochs": 5}), Entry("full", options={"model.epochs": 1})
    (group,) = planned(tmp_path, [block, full], match="flops")
    held, cell = group.recovery(block, {}), group.recovery(full, {})
    assert (held.budget["of"], held.budget["options"]) == ("block", {})
    steps = cell.budget["options"]["trainer.max_steps"]
    assert cell.budget["options"]["model.epochs"] == steps  # batches of eight: one step an epoch
    assert f"--trainer.max_steps={steps}" in cell.command
    costs = Costs()
    more = [re.sub(rf"((epochs|max_steps)=){steps}", rf"\g<1>{steps + 1}", one) for one in cell.command]
    assert cell.budget["planned"] <= held.budget["limit"] < costs.of(more, "flops")
    run = costs._planned(held.command)
    assert held.budget["limit"] == predict(run.shape, run.options).flops
    assert {"walk", "gram", "start", "training"} <= predict(run.shape, run.options).flops_by_kind.keys()
    assert costs.of(held.command, "tokens") == 640.0
    assert costs.within(more, "tokens", 640.0) == ({"model.epochs": 5, "trainer.max_steps": 5}, 640.0)
    with pytest.raises(ValueError, match="the matrix scope has none"):
        costs.within(
            ["fit", "-c", "scopes/matrix", "--model.name=random", f"--model.shape={json.dumps(LLAMA)}"], "flops", 1.0
        )


def test_seconds_are_planned_with_speeds_that_are_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def speeds(source: Any, options: Any, device: Any) -> dict[str, float]:
        measured.append(options.scope)
        return dict.fromkeys(KINDS, 1e9 * len(measured))

    monkeypatch.setattr("recon.cli.plan.measured_speeds", speeds)
    recoveries = [Entry("block", options={"model.epochs": 3}), Entry("submodule")]
    first, again = (planned(tmp_path, recoveries, match="seconds", seeds=seeds) for seeds in ([0, 1], [0]))
    found = [[group.recovery(entry, {}).budget for entry in recoveries] for group in (*first, *again)]
    assert found == [found[0]] * 3
    assert measured == ["block", "submodule"]  # for all seeds, and for the second start
    assert len(json.loads((tmp_path / SPEEDS).read_text())) == 2
    assert found[0][1]["planned"] <= found[0][0]["limit"]


def test_a_seed_chooses_the_sample_where_asked(tmp_path: Path) -> None:
    seeds = [0, 3]
    shared = planned(tmp_path, [Entry("block")], seeds=seeds)
    own = planned(tmp_path, [Entry("block")], seeds=seeds, resample=True)
    assert len({group.dense.directory for group in shared}) == 1
    assert len({group.dense.directory for group in own}) == 2
    for group, seed in zip(own, seeds, strict=True):
        for cell in (group.dense, group.pruned, group.recovery(Entry("block"), {})):
            assert cell.command[cell.command.index("--data.sample_seed") + 1] == str(seed)


def test_the_yaml_of_a_comparison_has_all_of_it(tmp_path: Path) -> None:
    file = tmp_path / "one.yaml"
    file.write_text(
        "name: one\nmatch: flops\nmatch_to: full\nresample: true\ndata: {num_test: 4}\n"
        "recoveries:\n  - {scope: matrix, matched: false}\n  - {scope: full}\n"
    )
    _, comparison = parsed(["-c", str(file)])
    assert (comparison.match, comparison.match_to, comparison.resample) == ("flops", "full", True)
    assert [entry.matched for entry in comparison.recoveries] == [False, True]
