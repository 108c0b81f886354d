"""The promise of all that reads a model's files: whatever they hold, what leaves is a ModelError of one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from afd.errors import ModelError

MAX_MESSAGE = 2000

FILE_ERRORS = (
    ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RecursionError, TypeError, ValueError,
)  # fmt: skip
"""What reading a file of unknown content may raise."""


@contextmanager
def model_door(model: str) -> Iterator[None]:
    """Turn FILE_ERRORS into a ModelError that names `model`, and any message into one line of bounded length."""
    try:
        yield
    except ModelError as error:
        raise ModelError(one_line(str(error))) from error
    except FILE_ERRORS as error:
        raise ModelError(one_line(f"{model}: its files cannot be read: {type(error).__name__}: {error}")) from error


def one_line(message: str) -> str:
    """What files say may hold any character and be of any length."""
    cut = message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + "..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in cut)
