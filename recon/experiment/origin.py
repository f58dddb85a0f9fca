"""The run that another recovery starts from: its weights and masks, and the checks that they are what was written."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel

from recon.basics.files import read_json
from recon.basics.run_paths import RunPaths
from recon.models.offload.disk_weights import DiskWeights
from recon.pruning.masks import Masks, identity_of

if TYPE_CHECKING:
    from recon.report import Report

OPTION = "--from"


class RunWeights(Mapping[str, Tensor]):
    """Parameter name -> weight of a recovered model, on the CPU, read from its files at each access.

    Args:
        directory: The recovered model.
        model: Gives names and shapes; its values are not read.

    Raises:
        ValueError: If the directory lacks a weight of `model`, or has it in another shape.
    """

    def __init__(self, directory: Path, model: PreTrainedModel) -> None:
        self._weights = DiskWeights(directory, model, OPTION)
        self._names = [name for name, _ in model.named_parameters()]

    def __getitem__(self, name: str) -> Tensor:
        return dict(self._weights.read([name]))[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Origin:
    """A finished run with a recovered model and its masks.

    Args:
        path: Its directory.
        option: The option or command that needs it, for messages.
    """

    path: Path
    option: str = OPTION

    @property
    def run(self) -> RunPaths:
        """Its products."""
        return RunPaths(self.path)

    def identity(self) -> dict[str, Any]:
        """Digests of weights and masks as its manifest has them, wherever the run is; empty if it has none."""
        run = self.run
        recorded = sorted(run.manifest.records(run.model).items())
        weights = {file.name: entry.sha256 for file, entry in recorded if file.suffix == ".safetensors"}
        if not weights or not run.masks.is_file():
            return {}
        return {"weights": weights, "masks": identity_of(run.masks)}

    def report(self) -> "Report":
        """Its measurements."""
        from recon.report import Report  # checked by a package that the library goes without until there is a report

        return Report.load(self.run.report)

    def dense(self) -> Mapping[str, Any]:
        """Identity of the dense model that it has pruned; of stored weights, whatever precision they were loaded in."""
        cure = "name another run, or run it again"
        identity = read_json(self.run.fingerprint_file, dict, self.option, cure).get("model")
        if not isinstance(identity, dict):
            raise ValueError(
                f"{self.option} needs a run that knows its dense model, got {self.path}, whose "
                f"{self.run.fingerprint_file.name} names none; {cure}"
            )
        return identity if "shape" in identity else {name: one for name, one in identity.items() if name != "dtype"}

    def require(self) -> None:
        """Refuse a run that has not ended, has no masks, or is not as it was written.

        Raises:
            ValueError: Naming what is missing or damaged.
        """
        run, needs = self.run, f"{self.option} needs a finished run with a recovered model and masks"
        if not self.path.is_dir():
            raise ValueError(f"{needs}, got {self.path}, which does not exist; name the directory of one")
        for product in (run.report, run.masks, run.model, run.fingerprint_file):
            if not run.manifest.records(product):
                raise ValueError(f"{needs}, got {self.path} without {product.name}; let it end, or name another one")
            run.manifest.require(product, "copy it again, or repeat the command of that run")

    def require_same_model(self, identity: Mapping[str, Any]) -> None:
        """Refuse a run of another dense model.

        Args:
            identity: Identity of a dense model, as `dense` has it.

        Raises:
            ValueError: With both identities.
        """
        if (theirs := self.dense()) != identity:
            raise ValueError(
                f"{self.option} needs a run of the same dense model, got {self.path}, which pruned {_short(theirs)}, "
                f"not {_short(identity)}; give the model options of that run"
            )

    def weights(self, model: PreTrainedModel) -> RunWeights:
        """Open its recovered weights for a model of its shape."""
        return RunWeights(self.run.model, model)

    def as_parent(self, perplexity: float | None) -> dict[str, Any]:
        """The run as one of the `parents` of a report.

        Args:
            perplexity: Of its model, measured as the report measures.
        """
        report = self.report()
        known = {"run_dir": str(self.path), "label": report.label, "seed": report.seed}
        return known | {"perplexity": perplexity}


def require_masks_of(origin: Origin, masks: Masks | Path | None) -> None:
    """Refuse other masks beside those of the run that recovery starts from.

    Raises:
        ValueError: If they differ.
    """
    if masks is None:
        return
    given = masks.fingerprint() if isinstance(masks, Masks) else identity_of(masks)
    if given != identity_of(origin.run.masks):
        raise ValueError(
            f"{origin.option} {origin.path} starts from weights under its own masks, got other ones, {masks}; leave "
            f"out --masks"
        )


def _short(identity: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {str(one)[:16]}" for name, one in identity.items())
