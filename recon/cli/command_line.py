"""A command line put in order: configurations first, then options, wholes before their parts, short names resolved.

An option so beats `-c` wherever it stands, and `--model.lr` finds the class that a later `-c` names. Nothing heavy is
imported here.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from recon.basics.refusals import UsageError
from recon.cli.configs import find_config, load, load_config
from recon.cli.names import CHOICES, LISTS, resolve

CONFIG = re.compile(r"(?:-c|--config)(?:=(?P<equals>.*))?$", re.DOTALL)
OPTION = re.compile(r"--(?P<name>[A-Za-z_][^=]*?)(?P<plus>\+?)(?:=(?P<equals>.*))?$", re.DOTALL)
SHORT = re.compile(r"-[A-Za-z].*")


@dataclass(frozen=True)
class Config:
    """A configuration that `-c` named.

    Args:
        path: Its file.
        content: What that says, short names resolved.
        changed: Whether one was.
    """

    path: str
    content: dict[str, Any]
    changed: bool

    @property
    def argument(self) -> str:
        """What `-c` is given: the path, or the content where a name was resolved."""
        return yaml.safe_dump(self.content, sort_keys=False) if self.changed else self.path


@dataclass
class Item:
    """An option with the values behind it; without a name, the values in front of all options.

    Args:
        name: Without dashes, such as `model.lr`.
        token: As it was written, without a value behind `=`.
        equals: The value behind `=`.
        values: The arguments up to the next option.
    """

    name: str = ""
    token: str = ""
    equals: str | None = None
    values: list[str] = field(default_factory=list)

    @property
    def value(self) -> str | None:
        """What the option was given, if anything."""
        return self.equals if self.equals is not None else (self.values[0] if self.values else None)

    def with_value(self, value: str) -> "Item":
        """This option with another value."""
        if self.equals is not None:
            return Item(self.name, self.token, value, self.values)
        return Item(self.name, self.token, None, [value, *self.values[1:]])

    def arguments(self) -> list[str]:
        """As on a command line."""
        if not self.token:
            return self.values
        return [self.token if self.equals is None else f"{self.token}={self.equals}", *self.values]


@dataclass(frozen=True)
class CommandLine:
    """A parsed command line.

    Args:
        configs: What `-c` named, scopes first: they name the class whose options the others, such as models, set.
        items: The options, in the order given.
    """

    configs: list[Config]
    items: list[Item]

    @classmethod
    def read(cls, args: list[str]) -> "CommandLine":
        """Split arguments into configurations and options.

        Raises:
            UsageError: If a configuration or the name of a class is unknown.
        """
        names: list[str] = []
        items = [Item()]
        queue = list(args)
        while queue:
            token = queue.pop(0)
            if found := CONFIG.match(token):
                if found["equals"] is None and not queue:
                    raise UsageError(f"{token} needs a YAML file or the name of a shipped configuration, got nothing")
                names.append(queue.pop(0) if found["equals"] is None else found["equals"])
                items.append(Item())  # values behind it are positional
            elif found := OPTION.match(token):
                written = token.partition("=")[0]
                items.append(Item(found["name"], written, found["equals"]))
            elif SHORT.match(token):
                items.append(Item(token[1:], token))
            else:
                items[-1].values.append(token)
        names.sort(key=lambda name: not name.startswith("scopes/"))
        return cls([_config(name) for name in names], [_resolved(item) for item in items if item.token or item.values])

    @property
    def chosen(self) -> dict[str, str]:
        """The class that each option of `CHOICES` ends up with, where one is named."""
        found: dict[str, str] = {}
        for config in self.configs:
            found |= classes_in(config.content)
        for item in self.items:
            if item.value is not None and _holds_choice(item.name):
                found |= classes_in(_nested(item.name, load_value(item.value)))
            elif item.value is not None and item.name.removesuffix(".class_path") in CHOICES:
                found[item.name.removesuffix(".class_path")] = item.value
        return found

    def arguments(self) -> list[str]:
        """The arguments in the order in which a parser should see them."""
        ordered = sorted(self.items, key=lambda item: item.name.count("."))
        leading = [arg for item in ordered if not item.token for arg in item.arguments()]
        options = [arg for item in ordered if item.token for arg in item.arguments()]
        configs = [arg for one in self.configs for arg in ("-c", one.argument)]
        return [*leading, *self._class_of_model(), *configs, *options]

    def _class_of_model(self) -> list[str]:
        """The scope in front of all, if a configuration sets an option of it before another names it."""
        sections = [one.content["model"] for one in self.configs if "model" in one.content]
        late = sections and "class_path" not in (sections[0] or {})
        return [f"--model={self.chosen['model']}"] if late and "model" in self.chosen else []


def load_value(text: str) -> Any:
    """What an option's value says as YAML; the text itself if it is none."""
    try:
        return load(text)
    except yaml.YAMLError:
        return text


def classes_in(content: Any, path: str = "") -> dict[str, str]:
    """Option of `CHOICES` -> class path, of a configuration whose names are resolved."""
    if isinstance(content, str) and path in CHOICES:
        return {path: content}
    if not isinstance(content, dict):
        return {}
    found = {path: content["class_path"]} if path in CHOICES and isinstance(content.get("class_path"), str) else {}
    for key, item in content.items():
        if key != "class_path":
            found |= classes_in(item, path if key == "init_args" else f"{path}.{key}".removeprefix("."))
    return found


def _config(name: str) -> Config:
    path = find_config(name)
    loaded = load_config(path)
    try:
        content = resolve(loaded)
    except UsageError as error:
        raise UsageError(f"{error} (in {path})") from None
    return Config(path, content, content != loaded)


def _resolved(item: Item) -> Item:
    """An option whose class names are class paths."""
    name = item.name.removesuffix(".help")
    if item.value is None or not (_holds_choice(name) or name in LISTS) or _is_file(item.value):
        return item
    given = load_value(item.value)
    resolved = resolve(given, name)
    if resolved == given:
        return item
    if isinstance(resolved, dict) and resolved.keys() == {"class_path"}:
        return item.with_value(resolved["class_path"])
    return item.with_value(json.dumps(resolved))


def _is_file(value: str) -> bool:
    try:
        return Path(value).is_file()
    except OSError:  # a class with many arguments is too long for a name
        return False


def _holds_choice(name: str) -> bool:
    return any(f"{one}.".startswith(f"{name}.") for one in CHOICES)


def _nested(name: str, value: Any) -> dict[str, Any]:
    for part in reversed(name.split(".")):
        value = {part: value}
    return value
