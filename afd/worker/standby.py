"""An FFN worker on standby: it holds every shard, and waits for the place of one that is lost."""

from __future__ import annotations

import queue
import threading

from afd.membership.port import Membership
from afd.messages.membership import ClusterView

LOOK_S = 0.1  # at the stop that may come instead


def wait_for_place(membership: Membership, incarnation: str, stop: threading.Event) -> int:
    """The rank that this worker, on standby so far, is to take over now; -1 when `stop` was set meanwhile."""
    places: queue.SimpleQueue[int] = queue.SimpleQueue()

    def look(view: ClusterView) -> None:  # side thread
        for member in view.standbys:
            if member.info.incarnation == incarnation and member.rank < view.num_ffn:
                places.put(member.rank)

    membership.on_view(look)
    while not stop.is_set():
        try:
            return places.get(timeout=LOOK_S)
        except queue.Empty:
            continue
    return -1
