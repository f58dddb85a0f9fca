"""Errors of those who called, told apart from errors of what ran."""

from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(ValueError):
    """What was asked for cannot be understood or done; nothing has run."""


@contextmanager
def refusals() -> Iterator[None]:
    """Make a `ValueError` of a check a `UsageError`.

    Raises:
        UsageError: With the message of the check.
    """
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error
