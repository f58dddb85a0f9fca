"""A measurement of speed as two tables: storages with bytes and errors, and times."""

from collections.abc import Sequence

from recon.report.sections import MISSING, Section, format_number
from recon.report.speed import DENSE, Product, Speed, Stored
from recon.report.speed_verdict import Gain, gains, listed, ratio

UNITS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))

WORDS = {"needs": "was not timed: it needs", "failed": "failed:", "wrong": "is wrong:"}
"""Status -> words between a storage and its reason."""


def speed_sections(speed: Speed) -> list[Section]:
    """The two tables."""
    return [_storage_section(speed), _time_section(speed)]


def _storage_section(speed: Speed) -> Section:
    header = ["matrix", "storage", "number", "zeros (%)", "KiB", "of dense", "largest error", "status"]
    rows = []
    for matrix in speed.matrices:
        dense = matrix.stored[0].num_bytes
        for one in matrix.stored:
            if one.status == "needs":
                continue
            size, share = MISSING, MISSING
            if one.num_bytes is not None and dense:
                size, share = format_number(one.num_bytes / 1024, 1), ratio(one.num_bytes / dense)
            error = MISSING if one.error is None else f"{one.error:.0e}"
            status = "ok" if one.status == "timed" else one.status
            about = [str(matrix.count), f"{100 * matrix.sparsity:.1f}"]
            rows.append([matrix.shape, one.storage, *about, size, share, error, status])
    notes = [reason for name in speed.storages for reason in _reasons(speed, name)]
    title = f"Storages of {speed.run_dir}: {speed.pattern}, {speed.dtype}, errors accepted up to {speed.tolerance:.0e}"
    return Section(title, header, rows, notes, num_text=2)


def _reasons(speed: Speed, name: str) -> list[str]:
    """Why a storage was not timed, once for all shapes with the same reason."""
    shapes: dict[tuple[str, str], list[str]] = {}
    for matrix in speed.matrices:
        one = matrix.of(name)
        if one.status != "timed":
            shapes.setdefault((one.status, one.reason), []).append(matrix.shape)
    return [
        f"{name}{'' if len(found) == len(speed.matrices) else f' for {listed(found)}'} {WORDS[status]} {reason}"
        for (status, reason), found in shapes.items()
    ]


def _time_section(speed: Speed) -> Section:
    """Rows of tokens for each shape, then those of all matrices together."""
    tried = {one.storage for matrix in speed.matrices for one in matrix.stored if one.status != "needs"}
    names = [name for name in speed.storages if name in tried and name != DENSE]
    header = ["matrix", "tokens", DENSE, *(column for name in names for column in (name, "speed"))]
    rows = []
    for matrix in speed.matrices:
        dense = _by_tokens(matrix.of(DENSE))
        for tokens in speed.tokens:
            row = [matrix.shape, f"{tokens:,}", _time(matrix.of(DENSE), dense.get(tokens))]
            for name in names:
                product = _by_tokens(matrix.of(name)).get(tokens)
                row += [_time(matrix.of(name), product)]
                row += [ratio(dense[tokens].seconds / product.seconds) if product and tokens in dense else MISSING]
            rows.append(row)
    rows += _of_all(speed, names)
    note = f"all: sum over the {speed.num_matrices} pruned matrices of the model, each as the measured one of its shape"
    title = "Time of a product: median ± half the interquartile range, and speed in multiples of dense's"
    return Section(title, header, rows, [note])


def _of_all(speed: Speed, names: Sequence[str]) -> list[list[str]]:
    """Sums over all matrices, for the storages in which all were timed."""
    found: dict[str, dict[int, Gain]] = {
        name: {one.tokens: one for one in gains(speed, name) if one.count == speed.num_matrices}
        for name in (DENSE, *names)
    }
    rows = []
    for tokens in speed.tokens:
        row = ["all", f"{tokens:,}"]
        for name, sums in found.items():
            one = sums.get(tokens)
            row.append(MISSING if one is None else _seconds(one.seconds))
            if name != DENSE:
                row.append(MISSING if one is None else ratio(one.speed))
        rows.append(row)
    return rows


def _by_tokens(stored: Stored) -> dict[int, Product]:
    return {one.tokens: one for one in stored.products}


def _time(stored: Stored, product: Product | None) -> str:
    if product is None:
        return MISSING if stored.status == "needs" else stored.status
    return f"{_seconds(product.seconds)} ±{50 * (product.high - product.low) / product.seconds:.0f}%"


def _seconds(value: float) -> str:
    """Three digits with a unit."""
    unit, size = next(((unit, size) for unit, size in UNITS if value >= size), UNITS[-1])
    amount = value / size
    return f"{amount:.{0 if amount >= 100 else 1 if amount >= 10 else 2}f} {unit}"
