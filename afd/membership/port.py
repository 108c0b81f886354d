"""What a worker sees of the cluster's membership: an interface without I/O.

`afd.cluster` gives each role an object of this shape (the coordinator's client behind it); tests give a fake.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from afd.messages.membership import ClusterView, StepCosts, WorkerInfo


@dataclass(frozen=True, slots=True)
class SyncFields:
    """What the main loop contributes to each heartbeat; read from the side thread, so it must be cheap.

    progress: main-loop counter.
    pending: work is waiting (pending with a still counter = stalled).
    stats: flat counters and gauges for `afd status`.
    silent_experts: (layer, expert) that give nothing.
    costs: of an attention worker that has measured its steps.
    """

    progress: int = 0
    pending: bool = False
    stats: dict[str, float] = field(default_factory=dict)
    silent_experts: tuple[tuple[int, int], ...] = ()
    costs: StepCosts | None = None


ViewCallback = Callable[[ClusterView], None]


class Membership(Protocol):
    """One process's place in the cluster. Every method may be called from any thread; none blocks but `close`.

    Rank first, addresses later is allowed: join with `mesh=None`, wait for the rank, bind, then `update_info`.
    The worker appears in the published view once its addresses are known.
    """

    @property
    def rank(self) -> int:
        """The rank given by the coordinator; -1 before."""
        ...

    @property
    def coordinator_alive(self) -> bool:
        """True while heartbeats are answered. False changes nothing on the data plane: the last view stays valid."""
        ...

    @property
    def lost(self) -> bool:
        """True once the cluster does not want this process any more: it ends without a drain."""
        ...

    def view(self) -> ClusterView | None:
        """The newest view; None before the first registration succeeded."""
        ...

    def update_info(self, info: WorkerInfo) -> None:
        """Publish changed addresses (same role and incarnation)."""
        ...

    def set_ready(self, ready: bool) -> None:
        """Model loaded and data plane connected; sent at once."""
        ...

    def set_loading(self, fraction: float) -> None:
        """Progress of loading the model, 0..1."""
        ...

    def set_draining(self, draining: bool) -> None:
        """No new requests for this worker; sent at once."""
        ...

    def report_pair(self, peer: str, broken: bool, reason: str = "") -> None:
        """The link to `peer` ("ffn/0") is broken beyond reconnection, or works again; sent at once."""
        ...

    def on_view(self, callback: ViewCallback) -> None:
        """Call `callback` with each new view (and with the present one now), from the side thread: be quick."""
        ...

    def close(self) -> None:
        """Say goodbye to the coordinator and stop. Idempotent; bounded by about a second."""
        ...


Join = Callable[[WorkerInfo, Callable[[], SyncFields]], Membership]
"""How a worker joins: what it says of itself, and the heartbeat fields; returns at once (registration goes on)."""

Announce = Callable[[dict[str, object]], None]
"""One line of news to the supervisor, if there is one: {"ready": True}, {"url": ...}, {"lost": ...}."""
