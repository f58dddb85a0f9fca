"""What the command line says of a mistake: one or two lines, with the name that was probably meant."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import SequenceMatcher, get_close_matches

from recon.basics.refusals import UsageError

ERRORS = (ValueError, OSError, FloatingPointError, MemoryError)
"""What a user can cure; anything else is a fault of ours and keeps its traceback."""


@contextmanager
def usage() -> Iterator[None]:
    """Make what goes wrong while a command line is parsed, and its objects are built, a `UsageError`.

    Raises:
        UsageError: With one or two lines for the user.
    """
    import argparse

    try:
        yield
    except UsageError:
        raise
    except (argparse.ArgumentError, *ERRORS) as error:
        raise UsageError(plain(str(error))) from error


def did_you_mean(word: str, words: Iterable[str], prefix: str = "") -> str:
    """`; did you mean x?` for the closest of some words, each behind `prefix`; empty if none is close."""
    close = [prefix + one for one in closest(word, words)]
    return f"; did you mean {' or '.join(close)}?" if close else ""


def closest(word: str, words: Iterable[str], num: int = 2) -> list[str]:
    """The words most like `word`, whatever their case, and about equally so; else those that contain it."""
    by_lower = {one.lower(): one for one in words}
    close = get_close_matches(word.lower(), by_lower, n=num, cutoff=0.7)
    if not close and len(word) > 2:
        close = [one for one in by_lower if word.lower() in one][:num]
    likeness = {one: SequenceMatcher(None, word.lower(), one).ratio() for one in close}
    return [by_lower[one] for one in close if likeness[one] > likeness[close[0]] - 0.05]


NOISE = re.compile(
    r"(Does not validate against any of the Union|Subtypes: |Errors:$|Given value type|Expected a path but |"
    r"Expected a <class 'NoneType'>|Problem with given class_path|Parser key )"
)
EXPECTED = re.compile(r"Expected (?:a |an )?(?P<type>.*?)(?:\. Got value: (?P<value>.*))?$")
GIVEN = re.compile(r"Given value: (?:NestedArg\(key='.*?', val=(?P<nested>.*)\)|(?P<value>.*))$")
FOREIGN = "does not correspond to a subclass"
TYPES = {"float": "a number", "int": "a whole number", "bool": "true or false", "str": "a text", "list": "a list"}


def plain(message: str) -> str:
    """A message of jsonargparse in one or two lines.

    It tries each type of a union in turn and reports all of them, the trivial ones too. Kept are the option, the
    types and the value.
    """
    keys = re.findall(r'Parser key "([^"]+)"', message)
    if not keys and "Does not validate against any" not in message:
        return "\n".join(line.strip() for line in message.splitlines() if line.strip())
    option = "--" + ".".join(keys)
    types, value, others = [], "", []
    for line in (line.strip().removeprefix("- ") for line in message.splitlines()):
        if found := GIVEN.match(line):
            value = value or (found["nested"] or found["value"]).strip("'")
        elif line and (not NOISE.match(line) or "instantiatable" in line):
            line = re.sub(r'Parser key "[^"]+":\s*', "", line)
            if found := EXPECTED.match(line):
                types += [_type(found["type"])] * (_type(found["type"]) not in types)
                value = found["value"] or value
            elif line:
                others.append(line)
    if types:  # the value of a known option; the other classes that might have it are beside the point
        others = [line for line in others if FOREIGN not in line]
    if others:
        lines = list(dict.fromkeys(others))
        if FOREIGN in lines[0] and value:
            lines[0] += f", got {value}"
        return _of_option(option, lines) if keys else "\n".join(lines)
    if value.startswith("Namespace("):
        value = ""
    choices = [one for text in types for one in re.split(r", | or ", text)] if "," in "".join(types) else []
    return f"{option} needs {' or '.join(types)}" + (f", got {value}" if value else "") + did_you_mean(value, choices)


def _of_option(option: str, lines: list[str]) -> str:
    """What is wrong with an option, in a line."""
    first = lines[0]
    if found := re.match(r"Option '(.*)' is not accepted", first):
        return f"there is no option {option}.{found[1]}"
    if found := re.match(r"unrecognized arguments: --([^ =]*)", first):
        return f"there is no option {option}.{found[1]}"
    if found := re.match(r"the following arguments are required: (.*)", first):
        return f"{option} needs {', '.join(f'{option}.{name}' for name in found[1].split(', '))}"
    return f"{option}: {'; '.join(lines)}"


def _type(name: str) -> str:
    """A type as a user would call it: `typing.Literal['a', 'b']` is `a or b`."""
    if found := re.match(r"typing\.Literal\[(.*)\]", name):
        *most, last = [one.strip().strip("'") for one in found[1].split(",")]
        return f"{', '.join(most)} or {last}" if most else last
    if found := re.match(r"<class '(.*)'>", name):
        return TYPES.get(found[1], found[1])
    return name
