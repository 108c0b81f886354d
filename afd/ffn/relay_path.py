"""Batch after batch of one attention worker that is alone, with one stream: native calls over a lane of the mesh.

Whatever native code does not take goes through `python_path`, one batch at a time. It stands back while there is
anybody whom it could keep waiting.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from afd.ffn.gang import GangBatch, GangTable
from afd.ffn.path import Lap, Leg
from afd.ffn.python_path import PythonPath, dispatches_of
from afd.relay.native import Outcome, Relayed
from afd.relay.runs import FfnRelay
from stepmesh.lane import Lane, Trips
from stepmesh.mesh import Mesh
from stepmesh.types import CombineMeta, RankId


class RelayPath:
    """A `BatchPath` around another one. layers: native code for the same half. Main thread only."""

    computing = False

    def __init__(self, inner: PythonPath, layers: FfnRelay, mesh: Mesh, gangs: GangTable):
        self._inner = inner
        self._layers = layers
        self._mesh = mesh
        self._gangs = gangs
        self._behind: GangBatch | None = None  # it was answered, and nobody has looked for the next one yet
        self._ended: Lane | None = None  # on which a step has come to its end, and another may begin
        self._late: tuple[RankId, int, int] | None = None  # peer, stream, step: its dispatches come too slowly to poll

    def run(self, batch: GangBatch) -> Leg:
        self._behind, self._ended = batch, None
        return self._inner.run(batch)

    def go_on(self) -> Leg | None:
        """The layers behind the batch that was answered last, or another step behind one that has ended."""
        batch, self._behind = self._behind, None
        if batch is not None:
            return self._layers_behind(batch)
        lane, self._ended = self._ended, None
        return None if lane is None else self._step_behind(lane)

    def finished(self) -> list[Leg]:
        return self._inner.finished()

    def _layers_behind(self, batch: GangBatch) -> Leg | None:
        arrival, layer = dispatches_of(batch)[0], batch.layer + 1
        header = arrival.header
        if (arrival.peer, header.stream, header.step) == self._late:
            return None
        if not self._layers.takes(layer, header.num_tokens):
            return None
        if batch.mask != 1 << arrival.peer.rank or self._gangs.num_active_streams > 1 or self._gangs.has_pending:
            return None
        lane = self._mesh.lanes.after_arrival(arrival, CombineMeta(batch.gang_id, batch.mask))
        return None if lane is None else self._booked(lane, self._layers.run(layer, lane), layer)

    def _step_behind(self, lane: Lane) -> Leg | None:
        gang = self._gangs.reserve(lane.peer.rank, lane.stream, lane.newest().epoch)
        if gang is None or not self._mesh.lanes.before_step(lane, CombineMeta(gang.id, gang.mask)):
            return None
        done = self._layers.begin(lane)
        if done.num_laps:
            self._gangs.form(gang, done.first_begun_s)
        elif done.outcome is Outcome.OTHER:  # not the step: perhaps it comes behind that
            self._ended = lane
        return self._booked(lane, done, 0)

    def _booked(self, lane: Lane, done: Relayed, layer: int) -> Leg:
        """What native code did from `layer` on, told to the mesh."""

        def times() -> Iterator[tuple[float, float]]:
            laps = done.laps()
            return zip(laps.begun_s.tolist(), laps.posted_s.tolist(), strict=True)

        self._mesh.lanes.book(lane, Trips(done.num_laps, done.num_laps, done.wait_s, done.ended_s, times))
        newest = lane.newest()
        if not done.on_time:
            self._late = lane.peer, lane.stream, newest.step
        elif self._layers.ends_with(layer + done.num_laps - 1):
            self._ended = lane
        return Leg(
            lane.stream,
            layer,
            done.num_laps,
            newest.num_tokens,
            1,
            newest.gang_id,
            newest.epoch,
            done.began_s,
            done.ended_s,
            done.compute_s,
            done.post_s,
            done.wait_s,
            partial(_laps, done),
        )


def _laps(done: Relayed) -> Iterator[Lap]:
    laps = done.laps()
    return map(Lap, laps.begun_s.tolist(), laps.computed_s.tolist(), laps.posted_s.tolist())
