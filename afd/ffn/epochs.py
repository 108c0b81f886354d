"""Which epochs an FFN worker keeps live: the newest, and older ones for as long as a step may still be in them."""

from __future__ import annotations

from collections import deque

from afd.messages.membership import ClusterView
from afd.worker.data_plane import mesh_members
from stepmesh.mesh import Mesh
from stepmesh.types import Role


class EpochFollower:
    """Tells the mesh of an FFN worker which attention workers belong to it. Main thread only.

    Attention workers hear of an epoch each at its own time, and end the steps that they have begun in an older one.
    Those that stay are to notice nothing, whatever joins or leaves in quick succession: so an epoch is kept until
    `keep_s` after the next one, by when no exchange of it can be under way.
    """

    def __init__(self, mesh: Mesh, keep_s: float):
        self._mesh = mesh
        self._keep_s = keep_s
        self._epoch = 0
        self._superseded: deque[tuple[int, float]] = deque()  # (epoch, when the next one came), oldest first

    def adopt(self, view: ClusterView, now: float) -> None:
        """A new view; nothing happens unless its epoch is new."""
        if view.epoch <= self._epoch:
            return
        if self._epoch:
            self._superseded.append((self._epoch, now))
        self._epoch = view.epoch
        self._mesh.set_members(view.epoch, mesh_members(view, Role.ATTENTION))

    def tick(self, now: float) -> None:
        """Let go of epochs that are over: who is in no later one is disconnected."""
        while self._superseded and now - self._superseded[0][1] > self._keep_s:
            self._mesh.retire_epoch(self._superseded.popleft()[0])
