"""Documents in memory, as a caller from Python has them."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset

from recon.basics.files import Writer, atomic_write
from recon.data.reading import Documents
from recon.data.sources import TextSource
from recon.data.token_source import Split


class Texts(TextSource):
    """Documents given as strings; splits without any are carved out of the first.

    Args:
        train: Documents for calibration.
        validation: Documents for validation.
        test: Documents for perplexity.

    Raises:
        ValueError: If `train` is empty or one of them is no list of strings.
    """

    def __init__(
        self, train: Sequence[str], validation: Sequence[str] | None = None, test: Sequence[str] | None = None
    ) -> None:
        given: dict[Split, Sequence[str] | None] = {"train": train, "validation": validation, "test": test}
        for split, documents in given.items():
            name = "text" if split == "train" else f"{split}_text"
            if isinstance(documents, str) or not all(isinstance(one, str) for one in documents or ()):
                raise ValueError(f"{name} needs a list of strings, one a document, got {type(documents).__name__}")
        if not train:
            raise ValueError("text needs at least one document, got none")
        self._documents = {split: list(documents or ()) for split, documents in given.items()}

    def __str__(self) -> str:
        return "the documents in text, validation_text and test_text"

    def has(self, split: Split) -> bool:
        """Whether documents were given for `split`."""
        return bool(self._documents[split])

    def load(self, split: Split) -> Documents:
        """The documents given for `split`."""
        return Dataset.from_dict({"text": self._documents[split]})

    def identity(self) -> dict[str, str]:
        """A digest of all documents."""
        return {"source": "Texts", "sha256": hashlib.sha256(json.dumps(self._documents).encode()).hexdigest()}

    def files(self, directory: Path) -> dict[str, list[str]]:
        """For each split with documents, the JSON lines file that `write` makes, as `recon.data.TextFiles` takes it."""
        name = self.identity()["sha256"][:12]  # other documents do not overwrite these
        options = {"train": "paths", "validation": "validation_paths", "test": "test_paths"}
        given = [split for split, documents in self._documents.items() if documents]
        return {options[split]: [str(directory / f"{split}-{name}.jsonl")] for split in given}

    def write(self, directory: Path, writing: Writer = atomic_write) -> None:
        """Write the documents of each split, so that the run can be repeated by a command.

        Args:
            directory: Of the files.
            writing: Opens each file; `Manifest.writing` records it, too.
        """
        given = filter(None, self._documents.values())
        for documents, (path,) in zip(given, self.files(directory).values(), strict=True):
            with writing(Path(path)) as temporary, temporary.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps({"text": one}) + "\n" for one in documents)
