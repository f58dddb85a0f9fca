"""A corpus of 120 short documents: as texts, as files of every kind, and as a data set of the hub."""

import csv
import json

from datasets import Dataset

from recon.data import HubDataset

WORDS = [f"w{index}" for index in range(200)]
END = len(WORDS)  # the id of the end-of-sequence token
TEXTS = [" ".join(WORDS[(7 * row + step) % 200] for step in range(10)) for row in range(120)]
"""120 documents of 10 tokens each, no two alike."""


def write(directory, suffix: str, texts=TEXTS, column="text", name="corpus") -> str:
    path = directory / f"{name}.{suffix}"
    rows = [{"id": index, column: text} for index, text in enumerate(texts)]
    if suffix in ("txt", "text"):
        path.write_text("\n\n".join(texts))
    elif suffix == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["id", column])
            writer.writeheader()
            writer.writerows(rows)
    else:
        Dataset.from_list(rows).to_parquet(str(path))
    return str(path)


def texts_of(source, split) -> list[str]:
    return [row["text"] for row in source.documents(split)]


def hub(monkeypatch, streaming=False, **options) -> HubDataset:
    """A hub data set served from memory; the calls that would have gone to the hub are in `.calls`."""
    calls = []

    def load_dataset(path, name=None, *, split, **rest):
        calls.append({"path": path, "name": name, "split": split, **rest})
        texts = TEXTS if split == "train" else [f"{split} w1"]
        rows = Dataset.from_dict({"text": texts, "url": ["x"] * len(texts)})
        return rows.to_iterable_dataset() if rest.get("streaming") else rows

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    source = HubDataset("owner/corpus", streaming=streaming, **options)
    source.calls = calls  # pyright: ignore[reportAttributeAccessIssue]
    return source
