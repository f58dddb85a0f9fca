"""The packages that a machine has, asked without importing them, and how to bring those that it lacks."""

import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

LIBRARY = (
    *("torch", "lightning", "transformers", "torchmetrics", "safetensors", "tokenizers", "huggingface_hub"),
    *("numpy", "yaml", "filelock", "rich", "typing_extensions", "jaxtyping", "wadler_lindig"),
)
"""Modules without which nothing runs; PyTorch, transformers and lightning bring all but the last two and rich."""

OLDEST = {"torch": (2, 11), "transformers": (5, 17)}
"""Oldest version, by its first two numbers."""

DISTRIBUTIONS = {"yaml": "pyyaml", "cpuinfo": "py-cpuinfo"}
"""Name of the package where the module has another."""


WITHOUT_WHEEL = ("deepspeed",)
"""Packages that the registry has as source only."""


def missing(modules: tuple[str, ...]) -> list[str]:
    """List those that are not installed, by the names of their packages."""
    return [DISTRIBUTIONS.get(name, name) for name in modules if find_spec(name) is None]


def outdated() -> list[str]:
    """List what is older than `OLDEST`."""
    found = []
    for name, oldest in OLDEST.items():
        try:
            given = version(name)
        except PackageNotFoundError:
            continue  # is missing
        if tuple(int(part) for part in given.split(".")[:2]) < oldest:
            found.append(f"{name} >= {'.'.join(map(str, oldest))}, got {given}")
    return found


def cure(packages: list[str]) -> str:
    """Say how to bring packages to a machine without a network."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    platforms = " ".join(f"--platform {one}" for one in ("manylinux_2_28_x86_64", "manylinux2014_x86_64"))
    tested = "--no-deps --constraint launch/constraints.txt"
    wheels = [one for one in packages if one not in WITHOUT_WHEEL]
    commands = [
        f"pip download {tested} --only-binary=:all: --python-version {python} {platforms} -d wheels {' '.join(wheels)}"
        if wheels
        else "",
        *(f"pip wheel {tested} -w wheels {one}" for one in packages if one in WITHOUT_WHEEL),
    ]
    return f"where there is a network: {' && '.join(filter(None, commands))}; here: bash launch/gpu.sh --wheels wheels"
