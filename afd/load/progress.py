"""How a run is doing, on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TextIO

_BAR_WIDTH = 24
TTY_INTERVAL_S = 0.25
PLAIN_INTERVAL_S = 10.0


@dataclass(frozen=True, slots=True)
class Status:
    """How far a run has come.

    num_tokens: chunks so far, of running requests too.
    elapsed_s: since the first was due.
    """

    num_total: int
    num_done: int
    num_failed: int
    num_running: int
    num_tokens: int
    elapsed_s: float


class Progress:
    """Draws Status values. Quiet when `stream` is None."""

    def __init__(self, stream: TextIO | None):
        self._stream = stream
        self._tty = stream is not None and stream.isatty()
        self._drawn = False

    @property
    def interval_s(self) -> float:
        """How often `show` is worth calling."""
        return TTY_INTERVAL_S if self._tty else PLAIN_INTERVAL_S

    def note(self, text: str) -> None:
        """A line of its own."""
        if self._stream is not None:
            self._clear()
            self._stream.write(text + "\n")
            self._stream.flush()

    def show(self, status: Status, *, last: bool = False) -> None:
        """The state now. last: the run is over, the bar goes away (a plain line stays)."""
        if self._stream is None:
            return
        if not self._tty:
            self._stream.write(render(status) + "\n")
        elif last:
            self._clear()
        else:
            done = _BAR_WIDTH * status.num_done // max(1, status.num_total)
            bar = "#" * done + "." * (_BAR_WIDTH - done)
            self._stream.write(f"\r\x1b[K[{bar}] {render(status)}")
            self._drawn = True
        self._stream.flush()

    def _clear(self) -> None:
        if self._drawn and self._stream is not None:
            self._stream.write("\r\x1b[K")
            self._drawn = False


def render(status: Status) -> str:
    """One line. The rate is chunks per second since the start: tokens, for servers that send one per chunk."""
    rate = status.num_tokens / status.elapsed_s if status.elapsed_s > 0 else 0.0
    failed = f", {status.num_failed} failed" if status.num_failed else ""
    return (
        f"{status.num_done}/{status.num_total} done, {status.num_running} running{failed}, "
        f"{rate:.0f} tok/s, {status.elapsed_s:.0f} s"
    )
