"""Stop strings over text that arrives in pieces: what may be shown is shown, what could still match is held back."""

from __future__ import annotations

from typing import NamedTuple


class StopResult(NamedTuple):
    """text: safe to show.
    matched: the stop string that ended the text, None while none has.
    """

    text: str
    matched: str | None


class StopMatcher:
    """Finds the first stop string to be complete; of those complete at the same character, the longest.

    That rule makes the result independent of how the text was cut into pieces. At most
    `longest stop string - 1` characters are held back.
    """

    def __init__(self, stops: tuple[str, ...], *, include: bool = False):
        """stops: not empty, each at least one character.
        include: the matched string is part of the text.
        """
        self._stops = stops
        self._include = include
        self._held = ""

    def push(self, text: str) -> StopResult:
        """Add text. After a match the matcher is spent: do not push again."""
        buffer = self._held + text
        match: tuple[int, int, str] | None = None  # (end, start, stop): the smallest is the rule above
        for stop in self._stops:
            start = buffer.find(stop)
            if start >= 0 and (match is None or (start + len(stop), start) < match[:2]):
                match = (start + len(stop), start, stop)
        if match is not None:
            end, start, stop = match
            self._held = ""
            return StopResult(buffer[: end if self._include else start], stop)
        num_held = self._num_held(buffer)
        self._held = buffer[len(buffer) - num_held :]
        return StopResult(buffer[: len(buffer) - num_held], None)

    def flush(self) -> str:
        """The text ends here: what was held back is ordinary text."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, buffer: str) -> int:
        """Length of the longest end of `buffer` that begins a stop string."""
        return max(self._num_begun(stop, buffer) for stop in self._stops)

    @staticmethod
    def _num_begun(stop: str, buffer: str) -> int:
        """Length of the longest end of `buffer` that begins `stop`: looked for only where its first character is."""
        start = buffer.find(stop[0], max(0, len(buffer) - len(stop) + 1))
        while start >= 0 and not stop.startswith(buffer[start:]):
            start = buffer.find(stop[0], start + 1)
        return len(buffer) - start if start >= 0 else 0
