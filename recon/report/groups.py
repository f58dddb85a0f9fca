"""Results arranged for reading: groups of what is comparable, rows in order, seeds averaged.

The table and the picture both start here, so that they cannot disagree.
"""

from dataclasses import dataclass

from recon.report.estimates import Estimate, estimate
from recon.report.schema import SCOPES, Report, Results
from recon.report.sections import flop_unit, format_number

AS_THEY_ARE = ("dense", "sparse")
"""Scopes of models that no seed has changed."""

REASON_LENGTH = 160
"""Characters of a failure's reason that tables and pictures show; the report has all of it."""


@dataclass(frozen=True)
class Row:
    """The cells of one label, one per seed."""

    scope: str
    label: str
    cells: list[Report]

    @property
    def of_seeds(self) -> list[Report]:
        """The cells that did not fail, one per seed."""
        return [cell for cell in self.cells if cell.status == "ok"]

    @property
    def measured(self) -> list[Report]:
        """The runs that did not fail, each once: only these are averaged. All seeds share one of the dense model."""
        return _each_run_once(self.of_seeds)

    @property
    def is_recovery(self) -> bool:
        """Whether a scope made it: a model as it is, and the pruned one before recovery, are none."""
        return self.scope not in ("dense", "sparse", "pruned")

    def estimate(self, quantity: str) -> Estimate | None:
        """Mean and deviation over seeds of one attribute of `Report`."""
        return estimate(getattr(cell, quantity) for cell in self.measured)


@dataclass(frozen=True)
class Group:
    """What one table section or one picture compares: same model, same text, same criterion, same pattern."""

    model: str
    text: str
    criterion: str
    pattern: str
    rows: list[Row]

    @property
    def cells(self) -> list[Report]:
        """All cells, row by row."""
        return [cell for row in self.rows for cell in row.cells]

    @property
    def seeds(self) -> list[int]:
        """The distinct seeds, sorted."""
        return sorted({cell.seed for cell in self.cells})

    @property
    def split(self) -> str:
        """The split that perplexity was measured on; "test" if the cells do not say."""
        splits = {str(cell.protocol["split"]) for cell in self.cells if "split" in cell.protocol}
        return "/".join(sorted(splits)) or "test"

    @property
    def failures(self) -> list[str]:
        """One sentence for each run that failed: which, where, why."""
        return [_failure(cell) for cell in self.failed]

    @property
    def failed(self) -> list[Report]:
        """The runs that failed, each once."""
        return [cell for row in self.rows for cell in _each_run_once(row.cells) if cell.status == "failed"]

    @property
    def remarks(self) -> list[str]:
        """What else a reader must know beside the numbers: violated masks, unequal protocols, ..."""
        notes = []
        for cell in (cell for row in self.rows for cell in _each_run_once(row.cells)):
            if cell.status == "ok" and cell.perplexity is None:
                notes.append(f"{_name(cell)} has no finite perplexity")
            if cell.mask_violations:
                notes.append(f"{_name(cell)} violates its masks: {cell.mask_violations:,} pruned weights are not zero")
            if (initial := cell.initial_perplexity) is not None:
                notes.append(f"{_name(cell)} began at a perplexity of {initial:,.2f}")
            if reset := cell.reset_windows:
                notes.append(
                    f"{_name(cell)}: {len(reset)} of {len(cell.windows)} windows ended worse than they began and kept "
                    f"their start, for want of text or by too high a learning rate"
                )
        if tracked := [cell for cell in self.cells if cell.tracked_device_bytes is not None]:
            device = any(cell.peak_device_bytes for cell in tracked)
            place = "on the device" if device else "that would be on a device, if there were one"
            allocated = "; peak allocated: by CUDA's allocator" if device else ""
            notes.append(f"Peak device: live tensors {place}, measured during recovery{allocated}")
            if few := cell.few_rows:
                name = min(few, key=lambda one: few[one])
                notes.append(
                    f"{_name(cell)}: {len(few)} matrices of experts saw fewer rows than they have inputs, the fewest "
                    f"{few[name]} for {name}: give more sequences, or pruning.experts: all"
                )
        notes += _held_equal(self.cells)
        if _num_protocols(self.cells) > 1:
            notes.append("These perplexities are not comparable: their protocols differ, see results.json")
        if baseline := estimate(cell.baseline_host_bytes for cell in self.cells):
            notes.append(f"Host peaks include {baseline.mean / 2**20:,.0f} MiB of libraries, loaded before the model")
        return notes


def group_cells(results: Results) -> list[Group]:
    """Groups in order of appearance; rows in order of `SCOPES`, then of appearance.

    Raises:
        ValueError: If two cells of a group have the same label and seed: averaging them would pass one
            seed for two.
    """
    groups: dict[tuple[str, str, str, str], dict[tuple[str, str], Row]] = {}
    for cell in results.cells:
        rows = groups.setdefault((cell.model, cell.text, cell.criterion, cell.pattern), {})
        row = rows.setdefault((cell.scope, cell.label), Row(cell.scope, cell.label, []))
        for twin in row.cells:
            if twin.seed == cell.seed:
                raise ValueError(
                    f"cells of one model, text, criterion and pattern must differ in label or seed; got "
                    f"{_name(cell)} twice, in {twin.run_dir!r} and in {cell.run_dir!r}. "
                    "Give one of them another `label`"
                )
        row.cells.append(cell)
    return [
        Group(*key, rows=sorted(rows.values(), key=lambda row: SCOPES.index(row.scope))) for key, rows in groups.items()
    ]


def _each_run_once(cells: list[Report]) -> list[Report]:
    """The cells without those that repeat a run: models as they are have one for all seeds of a comparison."""
    first: dict[str | int, Report] = {}
    for number, cell in enumerate(cells):
        repeats = cell.scope in AS_THEY_ARE and cell.run_dir
        first.setdefault(cell.run_dir if repeats else number, cell)
    return list(first.values())


def _held_equal(cells: list[Report]) -> list[str]:
    """What a comparison held equal, and the lengths of training that follow from it; nothing without `match`."""
    matched = [cell for cell in cells if cell.budget]
    if not matched:
        return []
    budget = matched[0].budget
    unit, size = flop_unit(budget["limit"]) if budget["quantity"] == "flops" else (budget["quantity"], 1.0)
    chosen = {cell.label: cell.budget["options"] for cell in matched if cell.budget["options"]}
    lengths = [f"{label} {' '.join(f'{k}={v}' for k, v in options.items())}" for label, options in chosen.items()]
    limit = f"{format_number(budget['limit'] / size, 2)} {unit}"
    return [f"Budget: {limit} at most, as planned for {budget['of']}{': ' if lengths else ''}{', '.join(lengths)}"]


def _name(cell: Report) -> str:
    return f"{cell.label} (seed {cell.seed})"


def _failure(cell: Report) -> str:
    reason = " ".join((cell.error or "").split())
    if len(reason) > REASON_LENGTH:
        reason = reason[: REASON_LENGTH - 3] + "..."
    place = f" in {cell.run_dir}" if cell.run_dir else ""
    return f"{_name(cell)} failed{place}: {reason}"


def _num_protocols(cells: list[Report]) -> int:
    distinct: list[dict] = []
    for cell in cells:
        protocol = {name: value for name, value in cell.protocol.items() if name != "sample"}
        if protocol and protocol not in distinct:
            distinct.append(protocol)
    return len(distinct)
