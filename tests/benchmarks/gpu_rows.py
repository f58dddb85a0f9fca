"""The rows of the acceptance table: what each of them recovers, how long it may take, and which packages it needs.

Nothing heavy is imported here: the command reads this list before it knows if the libraries are there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

COMMAND = (
    *("jsonargparse", "docstring_parser", "typeshed_client", "pydantic", "pydantic_core", "annotated_types"),
    *("typing_inspection", "datasets", "dill", "multiprocess", "pyarrow", "pandas", "xxhash", "aiohttp"),
    *("matplotlib", "tensorboard"),
)
"""Modules of `recon fit` as a command, beside those of the library, and what they need."""

ZERO = ("deepspeed", "hjson", "einops", "msgpack", "ninja", "psutil", "cpuinfo", "pydantic", "pydantic_core")
"""Modules of ZeRO, and what they need."""

SHAPE = Path(__file__).parents[2] / "configs" / "models" / "llama-2-7b.yaml"

SMALLER: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
}
"""Makes a Llama of 1.1 billion weights of Llama-2-7B's shape."""

TINY: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
"""Makes a model of nothing of any shape."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    Args:
        name: Of the row.
        scope: Of the recovery.
        kind: `fit`, a recovery by the library; `command`, `recon fit` on the bundled model, all of it; `rates`, of
            matrix products.
        changes: Fields of the shape that differ from Llama-2-7B's.
        num_sequences: Calibration sequences.
        seq_len: Tokens of a sequence.
        batch_size: Sequences of a step.
        options: Of the scope.
        strategy: `auto`, `zero2`, `zero3` or `fsdp2`.
        weight: Its part of the time that is left, relative to that of the rows after it.
        least: Seconds under which it is not begun.
        packages: Without one of these it is skipped.
    """

    name: str
    scope: Literal["matrix", "submodule", "block", "full"] = "submodule"
    kind: Literal["fit", "command", "rates"] = "fit"
    changes: Mapping[str, Any] = field(default_factory=dict)
    num_sequences: int = 128
    seq_len: int = 2048
    batch_size: int = 4
    options: Mapping[str, Any] = field(default_factory=dict)
    strategy: Literal["auto", "zero2", "zero3", "fsdp2"] = "auto"
    weight: float = 1.5
    least: float = 15.0
    packages: tuple[str, ...] = ()

    @property
    def is_compared(self) -> bool:
        """Whether the tracked peak has to be that of the allocator.

        Beside a tiny model cuBLAS's workspace counts; of a sharded one only what lives between steps is tracked.
        """
        return self.kind == "fit" and self.strategy == "auto"

    @property
    def num_windows(self) -> int:
        """Windows of a local scope; 0 of another."""
        per_block = {"submodule": 2, "block": 1, "matrix": 1, "full": 0}[self.scope] if self.kind == "fit" else 0
        return per_block * int(self.shape["num_hidden_layers"])

    @property
    def shape(self) -> dict[str, Any]:
        """The configuration of the model."""
        import yaml

        return yaml.safe_load(SHAPE.read_text())["model"]["shape"] | dict(self.changes)


def rows(tiny: bool) -> list[Row]:
    """All rows in their order: what is quick and tells most comes first."""
    two = {"changes": {"num_hidden_layers": 2}, "num_sequences": 32}
    seven: dict[str, Any] = {"weight": 3.0, "least": 40.0}
    found = [
        Row("rates", kind="rates", weight=0.5, least=5.0),
        Row("submodule, 2 blocks", "submodule", **two),
        Row("block, 2 blocks", "block", **two),
        Row("matrix, 2 blocks", "matrix", **two),
        Row("full, 2 blocks", "full", **two),
        Row("submodule, 2 blocks, offload host", options={"offload": "host", "activations": "host"}, **two),
        Row("full, 2 blocks, ZeRO-2", "full", strategy="zero2", packages=ZERO, **two),
        Row("full, 2 blocks, ZeRO-3", "full", strategy="zero3", packages=ZERO, **two),
        Row("full, 2 blocks, FSDP2", "full", strategy="fsdp2", **two),
        Row("recon fit, bundled model", kind="command", num_sequences=16, seq_len=256, packages=COMMAND),
        Row("full, 1 B", "full", changes=SMALLER, weight=2.0),
        Row("submodule, 7 B", "submodule", **seven),
        Row("block, 7 B", "block", **seven),
        Row("matrix, 7 B", "matrix", **seven),
    ]
    return [_tiny(row) for row in found if "B" not in row.name.split()] if tiny else found


def _tiny(row: Row) -> Row:
    sizes = {"changes": TINY, "num_sequences": 8, "seq_len": 32, "batch_size": 2, "least": 1.0}
    return Row(**{**vars(row), **sizes})
