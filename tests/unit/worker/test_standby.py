"""An FFN worker on standby learns its place from the view."""

from __future__ import annotations

import threading
from collections.abc import Callable

import msgspec

from afd.messages.membership import ClusterView, Member, Plan, WorkerInfo
from afd.worker.standby import wait_for_place


def view(**ranks: int) -> ClusterView:
    """Of a cluster of two FFN ranks, with these workers on standby."""
    infos = {name: WorkerInfo("ffn", name, "host", 1, "hash") for name in ranks}
    standbys = [Member(infos[name], rank, ready=True) for name, rank in ranks.items()]
    empty = ClusterView("cluster", 1, 1, 1, 2, "model", "hash", "hybrid", Plan(), [])
    return msgspec.structs.replace(empty, standbys=standbys)


class Views:
    """A membership that shows these views, one after another; behind them `then` happens."""

    def __init__(self, views: list[ClusterView], then: Callable[[], None] = lambda: None):
        self._views, self._then = views, then

    def on_view(self, callback: Callable[[ClusterView], None]) -> None:
        for one in self._views:
            callback(one)
        self._then()


def test_it_waits_until_it_is_given_a_shards_place() -> None:
    views = Views([view(me=2, other=3), view(me=2, other=0), view(me=1)])
    assert wait_for_place(views, "me", threading.Event()) == 1  # type: ignore[arg-type]


def test_a_stop_ends_the_wait() -> None:
    stop = threading.Event()
    assert wait_for_place(Views([view(me=2)], stop.set), "me", stop) == -1  # type: ignore[arg-type]
