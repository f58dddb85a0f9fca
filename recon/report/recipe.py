"""The stages of a recipe as a table: the quality after each, and its cost."""

from collections.abc import Mapping, Sequence

from recon.report.estimates import Estimate, estimate
from recon.report.schema import Report
from recon.report.sections import MISSING, Section, show


def recipe_section(title: str, stages: Mapping[str, Sequence[Report]]) -> Section:
    """One row per stage, and one for all.

    Args:
        title: Of the table.
        stages: Name of each stage -> its reports, the last of which is its result; the others are parts of it.
    """
    results = [reports[-1] for reports in stages.values()]
    flops = [_flops(reports) for reports in stages.values()]
    on_device = any(one.peak_device_bytes is not None for one in results)
    peaks = ["peak_host_bytes", *(["peak_device_bytes"] if on_device else [])]
    rows = [
        [
            name,
            one.label.partition(" after ")[0],
            _perplexity(one),
            *(_mib(getattr(one, peak)) for peak in peaks),
            *_costs([one], [number]),
        ]
        for name, one, number in zip(stages, results, flops, strict=True)
    ]
    largest = [max((getattr(one, peak) or 0 for one in results), default=0) or None for peak in peaks]
    rows.append(["together", "", _perplexity(results[-1]), *map(_mib, largest), *_costs(results, flops)])
    split = results[0].protocol.get("split", "test")
    header = ["stage", "recovery", f"{split} perplexity", "peak host (MiB)"]
    header += ["peak device (MiB)"] * on_device + ["seconds", "TFLOP, predicted", "train tokens (k)"]
    first = results[0]
    notes = [
        f"{name} perplexity {value:,.2f}"
        for name, value in (("dense", first.dense_perplexity), ("pruned", first.pruned_perplexity))
        if value is not None
    ]
    return Section(title, header, rows, [", ".join(notes)] if notes else [], num_text=2)


def _flops(reports: Sequence[Report]) -> float | None:
    """Predicted operations of a stage; None if one of its recoveries was not planned."""
    recoveries = reports[:-1] or reports
    if any("flops" not in one.prediction for one in recoveries):
        return None
    return float(sum(one.prediction["flops"] for one in recoveries))


def _perplexity(report: Report) -> str:
    return show(_one(report.perplexity), decimals=2)


def _mib(value: int | None) -> str:
    return show(_one(value), scale=2**-20, decimals=0)


def _costs(reports: Sequence[Report], flops: Sequence[float | None]) -> list[str]:
    seconds, tokens = sum(one.seconds for one in reports), sum(one.train_tokens for one in reports)
    known = [one for one in flops if one is not None]
    operations = show(_one(sum(known)), scale=1e-12) if len(known) == len(flops) else MISSING
    return [show(_one(seconds)), operations, show(_one(tokens), scale=1e-3, decimals=0)]


def _one(value: float | int | None) -> Estimate | None:
    return estimate([value])
