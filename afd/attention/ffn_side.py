"""How an attention worker sees the FFN side: whether it can be reached, and what a new view means for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from afd.attention.mesh_exchange import MeshExchange
from afd.attention.pair_watch import PairNews, PairWatch
from afd.messages.membership import ClusterView
from afd.worker.data_plane import mesh_members
from stepmesh.mesh import Mesh
from stepmesh.types import Role


class FfnSide(Protocol):
    """Main thread only."""

    @property
    def ready(self) -> bool:
        """True when every FFN rank can be reached, so that a step may start."""

    @property
    def down_reason(self) -> str:
        """Why it is not ready, in words for people."""

    @property
    def wakes(self) -> bool:
        """Whether an engine that waits for the FFN side is woken by gateways, too."""

    def adopt(self, view: ClusterView) -> None:
        """A new view: its FFN ranks count from each stream's next layer 0 on."""

    def tick(self, now: float) -> Sequence[PairNews]:
        """Call it many times a second -> links that are broken now, or work again."""


class LocalFfn:
    """The FFN half in this process (topology mono): it serves as soon as the cluster does."""

    wakes = False
    down_reason = "waiting for the coordinator's first view"

    def __init__(self) -> None:
        self.ready = False

    def adopt(self, view: ClusterView) -> None:
        self.ready = view.epoch > 0

    def tick(self, now: float) -> Sequence[PairNews]:
        return ()


class MeshFfn:
    """FFN workers that are reached over the mesh. wake_fd: of the gateways' messages; watched besides."""

    wakes = True

    def __init__(self, mesh: Mesh, exchange: MeshExchange, wake_fd: int):
        self._mesh = mesh
        self._exchange = exchange
        self._pairs = PairWatch(mesh.config.connect_timeout_s)
        mesh.watch_fd(wake_fd)

    @property
    def ready(self) -> bool:
        return self._exchange.ready

    @property
    def down_reason(self) -> str:
        return self._exchange.down_reason

    def adopt(self, view: ClusterView) -> None:
        if view.formed:
            self._exchange.adopt(view.epoch, mesh_members(view, Role.FFN))
        else:
            self._exchange.suspend("the cluster is not complete: an FFN worker is missing")

    def tick(self, now: float) -> Sequence[PairNews]:
        self._mesh.tick()
        return self._pairs.look({str(peer): why for peer, why in self._exchange.unreachable.items()}, now)
