"""Cases of a parametrised test that continuous integration leaves to `bash launch/test.sh -m slow`."""

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """A case that is marked slow."""
    return pytest.param(*values, marks=pytest.mark.slow)


def quick(cases: Any, *chosen: Any) -> list[Any]:
    """All `cases`, each a tuple or a single value, of which all but the `chosen` are marked slow.

    Raises:
        ValueError: If one of `chosen` is no case.
    """
    cases = list(cases)
    if missing := [one for one in chosen if one not in cases]:
        raise ValueError(f"the chosen need to be among the cases, got {missing}")
    return [one if one in chosen else slow(*(one if isinstance(one, tuple) else (one,))) for one in cases]
