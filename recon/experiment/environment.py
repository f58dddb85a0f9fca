"""Where and when a number was measured, and with which versions."""

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from recon import __version__

LIBRARIES = ("torch", "transformers", "lightning")


def versions() -> dict[str, str]:
    """Versions that can change a result."""
    return {"recon": __version__, "python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def environment(device: torch.device) -> dict[str, Any]:
    """The device by name, threads, date and versions."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).date().isoformat(),
        **versions(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or "CPU"
