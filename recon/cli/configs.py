"""Where the shipped configurations are, in a clone and in a wheel, and how `-c scopes/block` finds one."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from recon.basics.refusals import UsageError
from recon.cli.errors import did_you_mean

PACKAGE = Path(__file__).parents[1]


def config_directory() -> Path:
    """The directory of the shipped YAML files: inside an installed package, else beside it in a clone."""
    installed = PACKAGE / "configs"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def find_config(name: str) -> str:
    """The path of the configuration `name`: a real path always wins, then a shipped one.

    Raises:
        UsageError: If there is neither, with the closest shipped names.
    """
    if Path(name).is_file():
        return name
    shipped = config_directory() / (name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
    if shipped.is_file():
        return str(shipped)
    names = [path.relative_to(config_directory()).with_suffix("").as_posix() for path in shipped_configs()]
    names.sort(key=lambda one: not one.startswith("scopes/"))  # of names alike, scopes are what is mostly meant
    folder = name.partition("/")[0]
    similar = [one for one in names if one.startswith(f"{folder}/")] or sorted({one.partition("/")[0] for one in names})
    hint = did_you_mean(name, names) or f"; there are {', '.join(similar)}"
    raise UsageError(f"-c needs a YAML file or the name of a shipped configuration, got {name!r}{hint}")


def shipped_configs() -> list[Path]:
    """All shipped YAML files but `base.yaml`, which underlies every run and is never named."""
    return sorted(path for path in config_directory().rglob("*.yaml") if path.name != "base.yaml")


MERGE = "tag:yaml.org,2002:merge"
"""The key `<<`, which may stand for keys that are written, too."""


class Loader(yaml.SafeLoader):
    """YAML without its base-60 numbers, and with 1e-3 as one: `2:4` is a text here, and 124 in YAML 1.1.

    A key that stands twice is an error: of two values one would be dropped without a word.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As `SafeLoader.construct_mapping`.

        Raises:
            yaml.YAMLError: If a key stands twice.
        """
        keys: list[Any] = []
        for written in (key for key, _ in node.value if key.tag != MERGE):
            key = self.construct_object(written, deep=True)
            if key in keys:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", written.start_mark)
            keys.append(key)
        return super().construct_mapping(node, deep)


Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":int", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(([0-9][0-9_]*\.[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf)$|^\.nan$"),
    list("-+.0123456789"),
)


def load(text: str) -> Any:
    """What a YAML text says, `2:4` being a text and 1e-3 a number."""
    return yaml.load(text, Loader)


def load_config(path: str) -> dict[str, Any]:
    """The content of a configuration file.

    Raises:
        UsageError: If it cannot be read, is no YAML, or is no mapping.
    """
    try:
        content = load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"-c needs a YAML file, got {path}: {' '.join(str(error).split())}; correct it") from error
    if not content or not isinstance(content, dict):
        held = f"holds a {type(content).__name__}" if content else "is empty"
        raise UsageError(f"-c needs a YAML file of options and values, got {path}, which {held}; correct it")
    return content


def load_options(path: Path, sections: Sequence[str]) -> dict[str, Any]:
    """The options of a run, as its `config.yaml` has them.

    Args:
        path: The file.
        sections: Options that it needs.

    Raises:
        ValueError: If the file cannot be read or lacks one of them.
    """
    cure = "restore it, or run again with the same options in a new run_dir"
    try:
        content = load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"a run directory needs the options of the run, got {path} ({reason}); {cure}") from error
    missing = [name for name in sections if not isinstance(content, dict) or not isinstance(content.get(name), dict)]
    if missing:
        raise ValueError(f"a run directory needs the options of the run, got {path} without {missing[0]}; {cure}")
    return content
