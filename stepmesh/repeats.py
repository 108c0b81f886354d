"""Which warnings about strangers are worth a line: they must not be able to fill the log. Pure."""

from __future__ import annotations

_REPEAT_S = 30.0
_MAX_KEPT = 20  # different ones within that time


class Repeats:
    """Remembers what was said of whom."""

    def __init__(self) -> None:
        self._said: dict[tuple[str, str], float] = {}

    def is_news(self, who: str, reason: str, now: float) -> bool:
        """False when the same was said of the same host a moment ago, or too much of anybody. who: "host:port"."""
        self._said = {key: at for key, at in self._said.items() if now - at < _REPEAT_S}
        key = (who.rsplit(":", 1)[0], reason)
        if key in self._said or len(self._said) >= _MAX_KEPT:
            return False
        self._said[key] = now
        return True
