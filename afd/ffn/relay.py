"""An attention worker that is alone, with one stream: exchanges in native calls, `FfnRelay` over a lane of the mesh."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from afd.ffn.gang import Arrival, GangBatch, GangTable
from afd.kernels.relay import Outcome, Relayed
from afd.model.relay import FfnRelay
from stepmesh.lane import Lane, Trips
from stepmesh.mesh import Mesh
from stepmesh.types import CombineMeta, DispatchArrived, RankId


class RelayedGang(NamedTuple):
    """What was done for a gang of one, from `layer` on. Numbers only: who kept dispatches would keep their memory."""

    done: Relayed
    layer: int
    stream: int
    num_tokens: int
    gang_id: int
    epoch: int


class GangRelay:
    """Stands back while there is anybody whom it could keep waiting. Main thread only."""

    def __init__(self, layers: FfnRelay, mesh: Mesh, gangs: GangTable):
        self._layers = layers
        self._mesh = mesh
        self._gangs = gangs
        self._late: tuple[RankId, int, int] | None = None  # peer, stream, step: relayed to no avail
        self._ended: Lane | None = None  # on which a step has come to its end, and another may begin

    def behind(self, batch: GangBatch) -> RelayedGang | None:
        """The layers behind a batch that was answered, as far as native code gets; None where nothing was tried."""
        arrival = batch.arrivals[0].token
        assert isinstance(arrival, DispatchArrived)
        header, layer = arrival.header, batch.layer + 1
        self._ended = None
        if (arrival.peer, header.stream, header.step) == self._late:
            return None
        if not self._layers.takes(layer, header.num_tokens):
            return None
        if batch.mask != 1 << arrival.peer.rank or self._gangs.num_active_streams > 1 or self._gangs.has_pending:
            return None
        lane = self._mesh.lane_after_arrival(arrival, CombineMeta(batch.gang_id, batch.mask))
        if lane is None:
            return None
        return self._book(lane, self._layers.run(layer, lane), layer)

    def next_step(self) -> RelayedGang | None:
        """The step behind one that was relayed to its end, as far as native code gets; None where nothing was tried.

        Which gang it forms is known before it comes, and booked afterwards.
        """
        lane, self._ended = self._ended, None
        if lane is None:
            return None
        rank, epoch = lane.peer.rank, lane.newest().epoch
        sole = self._gangs.sole_gang(rank, lane.stream, epoch)
        if sole is None or not self._mesh.lane_before_step(lane, CombineMeta(*sole)):
            return None
        done = self._layers.begin(lane)
        if not done.num_laps:
            self._ended = lane if done.outcome is Outcome.OTHER else None
        else:
            begun_s = done.first_begun_s
            self._gangs.arrive(Arrival(rank, lane.stream, 0, epoch, 0, 0, lane.newest().num_tokens, begun_s))
            batch = self._gangs.next_batch(begun_s)
            assert batch is not None and (batch.gang_id, batch.mask) == sole, "nothing else came before"
        return self._book(lane, done, 0)

    def _book(self, lane: Lane, done: Relayed, layer: int) -> RelayedGang:
        def times() -> Iterator[tuple[float, float]]:
            laps = done.laps()
            return zip(laps.begun_s.tolist(), laps.posted_s.tolist(), strict=True)

        self._mesh.relayed(lane, Trips(done.num_laps, done.num_laps, done.wait_s, done.ended_s, times))
        newest = lane.newest()
        if not done.on_time:
            self._late = lane.peer, lane.stream, newest.step
        elif self._layers.ends_with(layer + done.num_laps - 1):
            self._ended = lane
        return RelayedGang(done, layer, lane.stream, newest.num_tokens, newest.gang_id, newest.epoch)
