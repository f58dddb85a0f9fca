"""What pip installs for an extra is enough for what the extra is for: all else is hidden from a run."""

import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.shapes import TIED_LLAMA, random_model

ROOT = Path(__file__).parents[1]
OF_A_VENV = {"pip", "setuptools"}
SMALL = ["--data.num_sequences=8", "--data.seq_len=32", "--data.num_validation=4", "--data.num_test=8"]


def installed_for(extra: str) -> set[str]:
    """The distributions that `pip install recon-llm[extra]` brings here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(project["optional-dependencies"][extra] if extra else ())]
    found: set[tuple[str, ...]] = set()
    todo = [Requirement(text) for text in asked]
    while todo:
        one = todo.pop()
        name = canonicalize_name(one.name)
        if (name, *sorted(one.extras)) in found:
            continue
        found.add((name, *sorted(one.extras)))
        try:
            more = [Requirement(text) for text in requires(name) or ()]
        except PackageNotFoundError:  # of other platforms
            continue
        extras = one.extras or {""}
        todo += [need for need in more if not need.marker or any(need.marker.evaluate({"extra": e}) for e in extras)]
    return {name for name, *_ in found} | OF_A_VENV


def hidden_from(extra: str) -> list[str]:
    """The modules of this environment that are not among those."""
    installed = installed_for(extra)
    owners = {module: {canonicalize_name(one) for one in names} for module, names in packages_distributions().items()}
    return sorted(module for module, names in owners.items() if not names & {*installed, "recon-llm"})


@pytest.mark.parametrize(
    ("extra", "args"),
    [
        ("", ["fit", "-c", "scopes/submodule", "--model.epochs=1", *SMALL, *random_model(TIED_LLAMA)]),
        ("eval", ["test", "bundled", "--tasks=identifiers", "--limit=4", *SMALL]),
    ],
)
def test_a_run_needs_no_more_than_is_installed(extra: str, args: list[str], tmp_path: Path) -> None:
    hidden = hidden_from(extra)
    assert {"pytest", "submitit"} <= set(hidden)
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({hidden})); sys.path.insert(0, {str(ROOT)!r})\n"
        f"from recon.cli import main; sys.exit(main({[*args, '--run_dir=run']}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.json").exists()
