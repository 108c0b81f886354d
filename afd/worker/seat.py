"""A worker's seat in the cluster: its rank, its mesh, and the newest view, for the main thread to adopt."""

from __future__ import annotations

import threading
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from afd.config import ClusterConfig
from afd.membership.port import Join, Membership, SyncFields
from afd.messages.keys import mesh_key
from afd.messages.membership import ClusterView, WorkerInfo
from afd.worker.data_plane import mesh_config, published_address
from afd.worker.standby import wait_for_place
from stepmesh.layout import PayloadLayout
from stepmesh.mesh import Mesh
from stepmesh.types import Role

POLL_S = 0.02
IDLE_S = 0.1
"""Longest block of a worker's loop: bounds the reaction to stop and to a new view."""
TURN_S = 10e-3
"""Time between a worker's looks at everything but the data path, while work is in flight."""


@dataclass(slots=True)
class Seat:
    """Owned by the worker's main thread. mesh is None in topology mono."""

    membership: Membership
    incarnation: str
    agreed: str
    rank: int = -1
    mesh: Mesh | None = None
    _fresh: deque[ClusterView] = field(default_factory=lambda: deque(maxlen=1))  # appended to by the side thread

    def new_view(self) -> ClusterView | None:
        """The newest view that was not taken yet. Those from before this worker was a member are not shown."""
        return self._fresh.pop() if self._fresh else None

    def follow(self) -> None:
        """Let `new_view` give views from now on."""
        self.membership.on_view(self._on_view)

    def _on_view(self, view: ClusterView) -> None:  # side thread
        if all(member.info.incarnation != self.incarnation for member in view.members):
            return
        self._fresh.append(view)
        if self.mesh is not None:
            self.mesh.wake()

    def close(self) -> None:
        """Leave the cluster, then close the data plane."""
        self.membership.close()
        if self.mesh is not None:
            self.mesh.close()


def take_seat(
    config: ClusterConfig,
    role: Role,
    secret: bytes,
    agreed: str,
    layout: PayloadLayout,
    info: WorkerInfo,
    join: Join,
    fields: Callable[[], SyncFields],
    stop: threading.Event,
    on_standby: Callable[[Seat], None],
) -> Seat | None:
    """Register, get a rank, bind the mesh, publish its address. None when `stop` was set meanwhile.

    agreed: config hash (hex).
    info: what the worker says of itself; incarnation, hash and mesh address are filled in.
    on_standby: an FFN worker that gets no shard yet is to load them all; its rank and its mesh come when one is free.
    """
    info = msgspec.structs.replace(info, incarnation=uuid.uuid4().hex, config_hash=agreed)
    membership = join(info, fields)
    seat = Seat(membership, info.incarnation, agreed)
    try:
        while (rank := membership.rank) < 0:
            if stop.wait(POLL_S):  # asked to stop, or refused: the role's frame knows which
                seat.close()
                return None
        seat.rank = rank
        if role is Role.FFN and rank >= config.topology.num_ffn and not config.topology.mono:
            on_standby(seat)
            membership.set_ready(True)
            seat.rank = wait_for_place(membership, info.incarnation, stop)
            if seat.rank < 0:
                seat.close()
                return None
            membership.set_ready(False)  # until it serves there
        if not config.topology.mono:
            seat.mesh = Mesh(mesh_config(config, role, seat.rank, info.incarnation, mesh_key(secret), agreed, layout))
            membership.update_info(msgspec.structs.replace(info, mesh=published_address(seat.mesh.address)))
        seat.follow()
    except BaseException:
        seat.close()
        raise
    return seat
