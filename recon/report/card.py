"""The card of a written model: a README in the format of the Hugging Face hub, with measurements as its metadata."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from recon.basics.units import readable
from recon.report.card_recipe import recipe
from recon.report.card_settings import calibration, method
from recon.report.markdown import one_line, rows, table
from recon.report.schema import Report
from recon.report.task_scores import main_of, shown

SUBJECTS = {
    "this model": "perplexity",
    "pruned, before recovery": "pruned_perplexity",
    "dense": "dense_perplexity",
}
"""Row of the metrics -> field of the report; the model's own stands first, for readers that take one."""


@dataclass(frozen=True)
class Facts:
    """The content of a card.

    Args:
        report: Of the run that made the model.
        made_with: The fingerprint of that run: `options`, `versions`, and the identities of `model`, `data`, `masks`.
        kinds: Kind of matrix, such as `self_attn.q_proj` -> number of its weights that are pruned, and of all.
        removes_experts: Whether whole experts are removed, so that the model is smaller and has no zeros.
        packed_bytes: Size of the model's directory if it held the kept weights and a bit per prunable weight.
        weights: Name of each weight file -> its sha256.
        licence: `license`, `license_name` and `license_link` of the base model, as far as they are known.
    """

    report: Report
    made_with: Mapping[str, Any]
    kinds: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    removes_experts: bool = False
    packed_bytes: int | None = None
    weights: Mapping[str, str] = field(default_factory=dict)
    licence: Mapping[str, str] = field(default_factory=dict)

    @property
    def hub_name(self) -> str | None:
        """The base model's name on the hub; None if it is from elsewhere."""
        return self.made_with.get("model", {}).get("name")

    @property
    def base(self) -> str:
        """The base model for people: a directory without the path to it, which is of one machine."""
        return self.hub_name or Path(self.report.model).name or self.report.model

    @property
    def title(self) -> str:
        """The model in a line; its name in the metadata, too."""
        pruned = f"{self.base}, pruned to {self.report.pattern}" if self.kinds else f"{self.base}, not pruned"
        return pruned if self.report.scope == "pruned" else f"{pruned}, trained at scope {self.report.label}"


def card(facts: Facts) -> ModelCard:
    """The card of a model."""
    text = "\n\n".join(_sections(facts))
    return ModelCard(f"---\n{_metadata(facts).to_yaml()}\n---\n\n{text}\n", ignore_metadata_errors=False)


def _metadata(facts: Facts) -> ModelCardData:
    scope = [] if facts.report.scope == "pruned" else [f"{facts.report.scope}-recovery"]
    data, licence = facts.made_with.get("data", {}), dict[str, Any](facts.licence)
    return ModelCardData(
        base_model=facts.hub_name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["recon", *_tags(facts), *scope],
        datasets=[data["path"]] if data.get("source") == "HubDataset" else None,
        model_name=facts.title,
        eval_results=list(_results(facts)) or None,
        **licence,
    )


def _tags(facts: Facts) -> list[str]:
    if facts.removes_experts:
        return ["pruned"]
    return ["pruned", "sparse"] if facts.kinds else []


def _results(facts: Facts) -> Iterator[EvalResult]:
    """The perplexities that were measured; those of other models than this one are called so."""
    protocol, data = facts.report.protocol, facts.made_with.get("data", {})
    source = str(data.get("source", "text"))
    for subject, name in SUBJECTS.items():
        value = getattr(facts.report, name)
        if value is not None:
            yield EvalResult(
                task_type="text-generation",
                dataset_type=str(data["path"]) if source == "HubDataset" else source,
                dataset_name=source,
                dataset_config=data.get("name") or None if source == "HubDataset" else None,
                dataset_split=protocol.get("split"),
                dataset_args={one: protocol[one] for one in ("num_sequences", "seq_len") if one in protocol} or None,
                metric_type="perplexity",
                metric_name="perplexity" if subject == "this model" else f"perplexity ({subject})",
                metric_value=value,
            )
    for name, score in facts.report.tasks.items():
        value, stderr = main_of(score)
        if value is not None:
            yield EvalResult(
                task_type="text-generation",
                dataset_type=name,
                dataset_name=name,
                dataset_args={one: score[one] for one in ("num_documents", "num_fewshot")} | {"stderr": stderr},
                metric_type=str(score["main"]),
                metric_value=value,
            )


def _sections(facts: Facts) -> Iterator[str]:
    report, how = facts.report, "Pruned" if facts.report.scope == "pruned" else "Pruned and recovered"
    yield f"# {one_line(facts.title)}"
    found = "removed experts are not in it" if facts.removes_experts else "pruned weights are stored as zeros"
    yield (
        f"{how if facts.kinds else 'Trained'} with recon {facts.made_with['versions']['recon']} from "
        f"`{one_line(facts.base)}`. Load it with `AutoModelForCausalLM.from_pretrained`; {found}."
    )
    yield "## Method\n\n" + rows("setting", "value", method(report, facts.made_with))
    if facts.kinds:
        yield "## Sparsity\n\n" + _sparsity(facts)
    yield "## Calibration data\n\n" + rows("setting", "value", calibration(facts.made_with))
    yield "## Perplexity\n\n" + _perplexity(report)
    if report.tasks:
        yield "## Tasks\n\n" + _tasks(report)
    yield "## Size on disk\n\n" + _size(facts)
    yield "## Reproduction\n\n" + recipe(report, facts.made_with)
    yield "## Verification\n\n" + _verification(facts)
    yield "## Licence\n\n" + _licence(facts)


def _sparsity(facts: Facts) -> str:
    counts = [*facts.kinds.items(), ("", _sum(facts.kinds.values()))]
    lines = [[f"`{kind}`", f"{total:,}", f"{pruned / max(1, total):.2%}"] for kind, (pruned, total) in counts]
    lines[-1][0] = "all of these"
    if facts.removes_experts:
        return table(["matrices", "weights before", "removed"], lines, num_text=1)
    if facts.report.model_sparsity is not None:
        lines.append(["all parameters", "", f"{facts.report.model_sparsity:.2%}"])
    return table(["matrices", "weights", "zeros"], lines, num_text=1)


def _sum(counts: Iterable[tuple[int, int]]) -> tuple[int, int]:
    pruned, total = zip(*counts, strict=True)
    return sum(pruned), sum(total)


def _perplexity(report: Report) -> str:
    values = {subject: getattr(report, name) for subject, name in SUBJECTS.items()}
    lines = [[subject, f"{value:,.3f}"] for subject, value in values.items() if value is not None]
    protocol = report.protocol
    measured = (
        f"Measured on the {protocol['split']} split, {protocol['num_sequences']:,} sequences of "
        f"{protocol['seq_len']:,} tokens."
    )
    share = None if report.scope == "pruned" else report.recovered
    closed = "" if share is None else f" Recovery closed {share:.1%} of the gap between pruned and dense."
    return table(["model", "perplexity"], lines, num_text=1) + f"\n\n{measured}{closed}"


def _tasks(report: Report) -> str:
    def of_dense(name: str) -> str:
        delta = report.task_deltas.get(name)
        return "" if delta is None else f"{delta:+.2%}"

    lines = [[name, str(one["main"]), shown(*main_of(one)), of_dense(name)] for name, one in report.tasks.items()]
    if len(lines) > 1 and (mean := report.task_mean) is not None:
        delta = mean["delta"]
        lines.append(["mean", "", shown(mean["value"], mean["stderr"]), "" if delta is None else f"{delta:+.2%}"])
    return table(["task", "metric", "score ± standard error", "distance to dense"], lines, num_text=2) + (
        "\n\nMeasured with lm-evaluation-harness; the standard error is that over documents."
    )


def _size(facts: Facts) -> str:
    sizes = {
        "dense": facts.report.references.get("dense", {}).get("disk_bytes"),
        "this model, as saved": facts.report.disk_bytes,
        "bit-packed in theory (kept weights, and one bit for each prunable weight)": facts.packed_bytes,
    }
    if facts.removes_experts:
        sizes.popitem()
    lines = [[name, "not known" if size is None else readable(size)] for name, size in sizes.items()]
    return table(["model", "size"], lines, num_text=1)


def _verification(facts: Facts) -> str:
    run = Path(facts.report.run_dir).name or "x"
    lines = [[f"`{name}`", f"`{digest}`"] for name, digest in facts.weights.items()]
    return (
        f"`recon verify runs/{one_line(run)}` checks the run directory that this model is from: every file's digest, "
        f"that pruned weights are zero, and that masks keep to their pattern. The numbers of this card are those of "
        f"`report.json` there. Weights that are copied elsewhere are told by their sha256:\n\n"
        + table(["file", "sha256"], lines, num_text=2)
    )


def _licence(facts: Facts) -> str:
    named = [facts.licence[key] for key in ("license", "license_name", "license_link") if key in facts.licence]
    if named:
        return f"That of the base model: {one_line(', '.join(named))}."
    return "That of the base model, which neither its card nor its configuration names."
