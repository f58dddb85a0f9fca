"""The recipes among the configurations of a command line, found before anything slow is imported."""

from typing import Any

from recon.basics.refusals import UsageError
from recon.cli.command_line import CONFIG
from recon.cli.configs import find_config, load_config

KEYS = ("stages", "recipes")
"""The one describes a recipe, the other lists recipes to choose from."""


def split(args: list[str]) -> tuple[str | None, list[str]]:
    """The configuration of `args` that holds a recipe or lists some, and the other arguments.

    Raises:
        UsageError: If there are several, or a configuration cannot be read.
    """
    recipes: list[str] = []
    others: list[str] = []
    queue = list(args)
    while queue:
        token = queue.pop(0)
        matched = CONFIG.match(token)
        if matched is None or (matched["equals"] is None and not queue):
            others.append(token)
            continue
        name = queue.pop(0) if matched["equals"] is None else matched["equals"]
        if any(key in load_config(find_config(name)) for key in KEYS):
            recipes.append(name)
        else:
            others += ["-c", name]
    if len(recipes) > 1:
        raise UsageError(f"recon fit takes one recipe, got {' and '.join(recipes)}; choose one")
    return (recipes[0] if recipes else None), others


def candidates(name: str) -> dict[str, dict[str, Any]]:
    """Name -> content of the recipe in a configuration, or of all that it lists, in its order.

    Raises:
        UsageError: If a list has other content, or one of its recipes is none.
    """
    content = load_config(find_config(name))
    if "recipes" not in content:
        return {name: content}
    listed = content["recipes"]
    if len(content) > 1 or not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
        raise UsageError(f"-c {name} needs a list of recipes, such as [recipes/a, recipes/b], and nothing else")
    found = {one: load_config(find_config(one)) for one in listed}
    if none := [one for one, of in found.items() if "stages" not in of]:
        raise UsageError(f"-c {name} lists recipes, got {none[0]}, which has no stages; correct it")
    return found
