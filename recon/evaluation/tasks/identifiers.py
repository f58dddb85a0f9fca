"""A task that ships: which of four identifiers of a file stands here? From the test split of the standard library.

No calibration sequence is from these files, whose split is decided by a hash of their path. The text differs between
Python versions, so scores compare only within one.
"""

import io
import random
import tokenize
from collections.abc import Iterator
from keyword import iskeyword, issoftkeyword
from typing import TYPE_CHECKING, Any

from recon.data.sources import StandardLibrary

if TYPE_CHECKING:
    from datasets import DatasetDict

CHOICES = 4
PER_FILE = 14
"""Questions of a file: all files count about equally, whatever their length."""
CONTEXT = 64
"""Characters in front of the identifier, about 20 tokens of the bundled model."""
SHORTEST = 4
"""Characters of an identifier: shorter ones are guessed by their frequency."""


def documents(**options: Any) -> "DatasetDict":
    """The questions as lm-evaluation-harness reads them: `context`, `choices`, `answer` (index of the right choice).

    Args:
        options: The metadata of the task, which the harness gives to every such function.
    """
    from datasets import Dataset, DatasetDict

    rows = [row for one in StandardLibrary().documents("test") for row in questions(one["text"])]  # pyright: ignore
    return DatasetDict({"test": Dataset.from_list(rows)})


def questions(text: str) -> list[dict[str, Any]]:
    """At most `PER_FILE` questions about a file, the same whenever they are asked for.

    The wrong choices are identifiers of the file too, and at most one character longer or shorter than the right one.
    None begins with an underscore, which tokenizers join with a dot in front: such a choice has no tokens of its own.
    """
    long = [(place, name) for place, name in identifiers(text) if len(name) >= SHORTEST and not name.startswith("_")]
    found, known = [one for one in long if one[0] >= CONTEXT], sorted({name for _, name in long})
    chance = random.Random(0)
    chance.shuffle(found)
    rows = []
    for place, name in found:
        others = [one for one in known if one != name and abs(len(one) - len(name)) <= 1]
        if len(others) < CHOICES - 1:
            continue
        answer, choices = chance.randrange(CHOICES), chance.sample(others, CHOICES - 1)
        choices.insert(answer, name)
        rows.append({"context": text[place - CONTEXT : place], "choices": choices, "answer": answer})
        if len(rows) == PER_FILE:
            break
    return rows


def identifiers(text: str) -> Iterator[tuple[int, str]]:
    """Position and name of each identifier in a Python file, up to the first fault of the file."""
    lines = io.StringIO(text).readlines()
    begins = [0]
    for line in lines:
        begins.append(begins[-1] + len(line))
    try:
        for token in tokenize.generate_tokens(iter(lines).__next__):
            name, (row, column) = token.string, token.start
            if token.type == tokenize.NAME and not (iskeyword(name) or issoftkeyword(name)):
                yield begins[row - 1] + column, name
    except (tokenize.TokenError, SyntaxError):
        return
