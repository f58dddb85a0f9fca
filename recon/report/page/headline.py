"""What the numbers of a group say, in sentences that are computed from them."""

from dataclasses import replace

from recon.report.front import memory_axis
from recon.report.groups import Group, Row
from recon.report.sampling import Sampled, best_recovery, difference, perplexity_error
from recon.report.sections import format_number, show

RESOLVED = 2.0
"""Standard errors from which on a difference is called one."""


def headline(group: Group) -> list[str]:
    """The best recovery, the distance of the smallest scope to it, and its distance to the dense model."""
    best = best_recovery(group)
    if best is None:
        return ["No recovery of this group was measured."]
    sentences = [_best(group, best)]
    small = _smallest(group)
    if small is not None and small is not best:
        sentences.append(_against(group, small, best))
    elif (rival := _second(group, best)) is not None:
        sentences.append(_against(group, rival, best))
    dense = next((row for row in group.rows if row.scope == "dense"), None)
    if dense is not None and (distance := difference(best, dense)) is not None:
        sentences.append(
            f"{_named(best)} is {_size(distance)} nats per token behind the dense model{_over_seeds(distance)}."
        )
    return sentences


def _best(group: Group, best: Row) -> str:
    num = sum(row.is_recovery and bool(row.measured) for row in group.rows)
    first = f"Of {num} recoveries {best.label} is best" if num > 1 else f"Recovery at the scope {best.label} ends"
    error = perplexity_error(best)
    parts = [f"{first} with a {group.split} perplexity of {show(best.estimate('perplexity'), decimals=2)}"]
    if error is not None:
        parts.append(f" (± {format_number(error, 2)} by the choice of test sequences)")
    for scope in ("dense", "pruned"):
        if (row := next((row for row in group.rows if row.scope == scope), None)) is not None:
            link = ", against" if scope == "dense" else " and"
            parts.append(f"{link} {show(row.estimate('perplexity'), decimals=2)} {scope}")
    if (recovered := best.estimate("recovered")) is not None:
        parts.append(f": {show(recovered, scale=100.0)} % of what pruning cost")
    if len(best.measured) > 1:
        parts.append(f", mean of {len(best.measured)} seeds")
    return "".join(parts) + "."


def _smallest(group: Group) -> Row | None:
    """The best row of submodules: whether they suffice is the question."""
    rows = [(one.mean, i, row) for i, row in enumerate(group.rows) if (one := row.estimate("perplexity")) is not None]
    return min(((mean, i, row) for mean, i, row in rows if row.scope == "submodule"), default=(0, 0, None))[2]


def _second(group: Group, best: Row) -> Row | None:
    others = [row for row in group.rows if row is not best]
    return best_recovery(replace(group, rows=others))


def _against(group: Group, row: Row, best: Row) -> str:
    """How far a row is behind the best, and what it needs of the best one's memory."""
    distance = difference(row, best)
    if distance is None:
        text = f"{_named(row)} reaches {show(row.estimate('perplexity'), decimals=2)}"
    elif abs(distance.mean) < RESOLVED * distance.error:
        text = (
            f"{_named(row)} is not told apart from it: {distance.text} nats per token on the same "
            f"{distance.num_sequences} sequences{_over_seeds(distance)}"
        )
    else:
        text = (
            f"{_named(row)} is {_size(distance)} nats per token behind it on the same {distance.num_sequences} "
            f"sequences{_over_seeds(distance)}"
        )
    quantity, name = memory_axis(group)
    needs, most = row.estimate(quantity), best.estimate(quantity)
    if needs is None or most is None or not most.mean:
        return text + "."
    return (
        f"{text}, with {needs.mean / most.mean:.2f} of its {name} "
        f"({show(needs, scale=2**-20)} and {show(most, scale=2**-20)} MiB)."
    )


def _named(row: Row) -> str:
    return row.label[:1].upper() + row.label[1:]


def _size(distance: Sampled) -> str:
    """A distance that is known to be one, with its standard error."""
    return f"{distance.mean:.4f} ± {distance.error:.4f}"


def _over_seeds(distance: Sampled) -> str:
    return "" if distance.std is None else f" (seeds: ± {distance.std:.4f})"
