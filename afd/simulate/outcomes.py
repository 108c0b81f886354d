"""What became of each request, and the file that tells of them one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec

from afd.errors import ConfigError

Ending = Literal["answered", "refused", "lost"]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The end of one request. Times are simulated seconds; those of tokens are null where there were none.

    request: its place in the arrivals, from 0.
    at_s: when it came, counted as arrivals are.
    input_len, output_len: tokens of the prompt, and of the answer as far as it came.
    reason: of a refusal or a loss.
    tpot_s: null for answers of one token.
    e2el_s: from arrival to this end.
    cached_tokens: of the prompt, found in its worker's prefix cache.
    worker: the one that had it last; "" = none had.
    attempts: workers that it was begun at anew.
    """

    request: int
    at_s: float
    input_len: int
    output_len: int
    ending: Ending
    reason: str = ""
    ttft_s: float | None = None
    tpot_s: float | None = None
    e2el_s: float
    cached_tokens: int = 0
    worker: str = ""
    attempts: int = 1
    preempted: int = 0


@contextmanager
def outcome_file(path: str) -> Iterator[Callable[[Outcome], None]]:
    """A file of JSON lines, one for each request, in the order in which they end. ConfigError where it cannot be
    written.
    """
    encoder = msgspec.json.Encoder()
    try:
        with Path(path).open("wb") as file:
            yield lambda outcome: _write(file, encoder.encode(outcome))
    except OSError as error:
        raise ConfigError(f"--per-request {path}: {error.strerror or error}") from None


def _write(file: BinaryIO, line: bytes) -> None:
    file.write(line + b"\n")
