"""Which links to FFN workers have been broken for so long that the coordinator has to act. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class PairNews(NamedTuple):
    """A link that is broken for good as far as this end can tell, or works again. peer: "ffn/0"."""

    peer: str
    broken: bool
    reason: str = ""


class PairWatch:
    """patience_s: a link that is down for longer is reported, once; and once more when it is back."""

    def __init__(self, patience_s: float):
        self._patience_s = patience_s
        self._since: dict[str, float] = {}
        self._reported: set[str] = set()

    def look(self, unreachable: Mapping[str, str], now: float) -> list[PairNews]:
        """What is to be reported now. unreachable: peers that are down, with the reason."""
        self._since = {peer: self._since.get(peer, now) for peer in unreachable}
        broken = {peer for peer, since in self._since.items() if now - since > self._patience_s}
        news = [PairNews(peer, True, unreachable[peer]) for peer in sorted(broken - self._reported)]
        news += [PairNews(peer, False) for peer in sorted(self._reported - broken)]
        self._reported = broken
        return news
