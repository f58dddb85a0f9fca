"""Where the shipped configurations are, in a clone and in a wheel, and how `-c scopes/block` finds one."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def config_directory() -> Path:
    """The directory of the shipped YAML files: inside an installed package, else beside it in a clone."""
    installed = PACKAGE / "configs"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def find_config(name: str) -> str:
    """The path of the configuration `name`: a real path always wins, then a shipped one.

    Raises:
        ValueError: If there is neither, with the shipped names.
    """
    if Path(name).is_file():
        return name
    shipped = config_directory() / (name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
    if shipped.is_file():
        return str(shipped)
    names = sorted(path.relative_to(config_directory()).with_suffix("").as_posix() for path in shipped_configs())
    raise ValueError(f"-c needs a file or one of the shipped configurations, got {name!r}; shipped: {', '.join(names)}")


def shipped_configs() -> list[Path]:
    """All shipped YAML files but `base.yaml`, which underlies every run and is never named."""
    return sorted(path for path in config_directory().rglob("*.yaml") if path.name != "base.yaml")


def resolve_config_names(args: list[str]) -> list[str]:
    """Command-line arguments with the value of each `-c` and `--config` replaced by a path.

    Scopes go first, for they name the class whose options the others, such as models, set.
    """
    resolved = list(args)
    places = [index + 1 for index, arg in enumerate(args[:-1]) if arg in ("-c", "--config")]
    names = sorted((args[place] for place in places), key=lambda name: not name.startswith("scopes/"))
    for place, name in zip(places, names, strict=True):
        resolved[place] = find_config(name)
    for index, arg in enumerate(args):
        if arg.startswith("--config="):
            resolved[index] = f"--config={find_config(arg.removeprefix('--config='))}"
    return resolved
