"""The names of all files in a run's directory, once."""

from dataclasses import dataclass
from pathlib import Path

from recon.basics.manifest import NAME, Manifest

PARTS = "parts"


@dataclass(frozen=True)
class RunPaths:
    """Where each product of a run is. `products` lists them all.

    Args:
        path: The run's directory.
    """

    path: Path

    @property
    def manifest(self) -> Manifest:
        """The records of all products that are read again; a part has those of its run."""
        return Manifest(self.path.parents[1] if self.path.parent.name == PARTS else self.path)

    @property
    def fingerprint_file(self) -> Path:
        """The identity of the run: options, model, data, masks, versions."""
        return self.path / "fingerprint.json"

    @property
    def config(self) -> Path:
        """The resolved options of the run."""
        return self.path / "config.yaml"

    @property
    def text(self) -> Path:
        """The documents of a call from Python, one JSON lines file a split."""
        return self.path / "text"

    @property
    def masks(self) -> Path:
        """The bit-packed masks."""
        return self.path / "masks.safetensors"

    @property
    def moved(self) -> Path:
        """The weights as a criterion that moves them left them."""
        return self.path / "moved.safetensors"

    @property
    def block_masks(self) -> Path:
        """The masks of each block, while they are chosen along with recovery."""
        return self.path / "masks"

    @property
    def start(self) -> Path:
        """The exact solution of each matrix by itself."""
        return self.path / "start.safetensors"

    @property
    def dense(self) -> Path:
        """The dense weights of an offloaded model that no other directory holds."""
        return self.path / "dense"

    @property
    def windows(self) -> Path:
        """The weights of each recovered window."""
        return self.path / "windows"

    @property
    def window_results(self) -> Path:
        """The held-out errors of all windows."""
        return self.path / "windows.json"

    @property
    def rates(self) -> Path:
        """The learning rates that a local scope has chosen, and what it saw."""
        return self.path / "rates.json"

    @property
    def parts(self) -> Path:
        """The measurements of jobs that each recover one part of the windows."""
        return self.path / PARTS

    @property
    def checkpoints(self) -> Path:
        """The state from which full retraining goes on."""
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """The weights of full retraining as they were when its held-out loss was lowest."""
        return self.path / "best.safetensors"

    @property
    def begun(self) -> Path:
        """There while a fit runs whose last seconds are recorded nowhere yet; what a killed one leaves."""
        return self.path / "begun"

    @property
    def log(self) -> Path:
        """The lines that recon logged."""
        return self.path / "log.txt"

    @property
    def logs(self) -> Path:
        """The curves for TensorBoard."""
        return self.path / "logs"

    @property
    def model(self) -> Path:
        """The recovered model in Hugging Face format."""
        return self.path / "model"

    @property
    def card(self) -> Path:
        """The card of the recovered model, a part of `model`."""
        return self.model / "README.md"

    @property
    def task_scores(self) -> Path:
        """The scores on tasks that are measured already, of a run without a report."""
        return self.path / "tasks.json"

    @property
    def report(self) -> Path:
        """The report of the finished run."""
        return self.path / "report.json"

    @property
    def speed(self) -> Path:
        """The times of products with the matrices of the model."""
        return self.path / "speed.json"

    def memory(self, rank: int = 0) -> Path:
        """The peak memory of each phase on one rank."""
        return self.path / ("memory.json" if rank == 0 else f"memory-rank{rank}.json")

    @property
    def products(self) -> tuple[Path, ...]:
        """All of the above; `memory` of rank 0 stands for those of all ranks."""
        return (
            self.path / NAME,
            self.fingerprint_file,
            self.config,
            self.text,
            self.masks,
            self.moved,
            self.block_masks,
            self.start,
            self.dense,
            self.windows,
            self.window_results,
            self.rates,
            self.parts,
            self.checkpoints,
            self.best,
            self.begun,
            self.log,
            self.logs,
            self.model,
            self.task_scores,
            self.report,
            self.speed,
            self.memory(),
        )

    @property
    def claims(self) -> tuple[Path, ...]:
        """Products that another run must not take for its own; those of a run that failed early are no obstacle."""
        return self.masks, self.block_masks, self.windows, self.checkpoints, self.report

    @property
    def temporary(self) -> tuple[Path, ...]:
        """Products without a use once the run has its report."""
        return self.block_masks, self.start, self.dense, self.checkpoints, self.best, self.begun, self.task_scores
