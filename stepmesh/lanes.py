"""The lanes of a mesh: which stream native code may drive now, from where it goes on, and what it did.

    lane = mesh.lanes.after_answer(peer, meta, num_tokens)    # FFN side: after_arrival(arrival, answered)
    ... native code goes on from lane.last: posts, awaits, takes ...
    mesh.lanes.book(lane, trips)                              # what it did
    mesh.lanes.before_step(lane, answer)                      # FFN side, later: again, for the step that comes next

There is no lane without shared memory or the compiled half, with checksums, or while anybody else could be kept
waiting: with a second peer, or an event that was not taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from stepmesh.lane import BEFORE_FIRST, Lane, Trips
from stepmesh.pair import AttentionPair, FfnPair, Pair
from stepmesh.roster import Roster
from stepmesh.trace import Record, Stage
from stepmesh.types import CombineMeta, DispatchArrived, DispatchMeta, FrameKind, Header, RankId
from stepmesh.window import Exchange
from stepmesh.wire import CHECKSUM_NONE, DATA_MAGIC, PROTOCOL_VERSION

_LOW64 = (1 << 64) - 1
_DISPATCH = int(FrameKind.DISPATCH)


class Lanes:
    """Main thread only, which asks the mesh for nothing between a call that gives a lane and `book`."""

    def __init__(self, roster: Roster, newest_seq: Callable[[int], int], booked: Callable[[int, int], None]):
        """newest_seq: of a stream, attention side.
        booked: told the stream and how many dispatches left on it.
        """
        self._roster = roster
        self._newest_seq = newest_seq
        self._booked = booked

    def after_answer(self, peer: RankId, meta: DispatchMeta, num_tokens: int) -> Lane | None:
        """Attention: the lane on which native code may go on, with dense rows, from the stream's newest dispatch.

        meta: of that dispatch; where a step begins, of its first one with layer BEFORE_FIRST. None while an exchange of
        the stream is open, and where there is no lane: use `Mesh.dispatch`.
        """
        pair, stream = self._only_pair(peer), meta.stream
        if not isinstance(pair, AttentionPair) or not pair.window.is_free(stream):
            return None
        lane, layout, mask = self._lane_of(pair, stream), pair.env.config.layout, meta.member_mask
        if lane is not None:
            lane.follow(
                Header(
                    magic=DATA_MAGIC,
                    version=PROTOCOL_VERSION,
                    kind=_DISPATCH,
                    flags=meta.flags,
                    epoch=meta.epoch,
                    generation=pair.generation,
                    seq=self._newest_seq(stream),
                    step=meta.step,
                    gang_id=meta.gang_id,
                    compute_ns=0,
                    member_mask_low=mask & _LOW64,
                    member_mask_high=mask >> 64,
                    num_tokens=num_tokens,
                    gang_tokens=0,
                    payload_bytes=layout.dispatch(num_tokens, 0).total,
                    checksum=0,
                    stream=stream,
                    layer=meta.layer,
                    top_k=0,
                    wire_dtype=layout.dispatch_dtype,
                    checksum_kind=CHECKSUM_NONE,
                )
            )
        return lane

    def after_arrival(self, arrival: DispatchArrived, answered: CombineMeta) -> Lane | None:
        """FFN: the lane on which native code may go on, with dense rows, from the newest dispatch, answered so."""
        header, pair = arrival.header, self._only_pair(arrival.peer)
        if not isinstance(pair, FfnPair) or pair.generation != header.generation or not pair.is_settled(header):
            return None
        lane = self._lane_of(pair, header.stream)
        if lane is not None:
            payload_bytes = pair.env.config.layout.dispatch(header.num_tokens, 0).total
            lane.follow(_of_gang(header, answered)._replace(top_k=0, payload_bytes=payload_bytes))
        return lane

    def before_step(self, lane: Lane, answer: CombineMeta) -> bool:
        """FFN: whether native code may go on with the step behind the newest dispatch on this lane, and answer its
        layer 0, and what follows, so. False: use `Mesh.progress`.
        """
        pair, newest = self._only_pair(lane.peer), lane.newest()
        if not isinstance(pair, FfnPair) or pair.lanes.get(lane.stream) is not lane or not pair.is_settled(newest):
            return False
        lane.follow(_of_gang(newest, answer)._replace(layer=BEFORE_FIRST))
        return True

    def book(self, lane: Lane, trips: Trips) -> None:
        """What native code did on a lane. An answer that is still awaited will be one like any other."""
        pair, last, newest = self._roster.pairs[lane.peer], lane.last, lane.newest()
        assert last is not None, "a lane is given with what it goes on from"
        layout, stats = pair.env.config.layout, pair.stats
        answer_bytes = trips.num_answered * layout.combine(newest.num_tokens).total
        dispatch_bytes = trips.num_sent * newest.payload_bytes
        self._booked(lane.stream, trips.num_sent)
        if isinstance(pair, AttentionPair):
            stats.sent(trips.num_sent, dispatch_bytes)
            stats.received(trips.num_answered, answer_bytes)
            stats.answers_waited_ns += int(trips.waited_s * 1e9)
            if trips.num_answered < trips.num_sent:
                seq, layer = last.seq + trips.num_sent, last.layer + trips.num_sent & BEFORE_FIRST
                exchange = Exchange(seq, last.epoch, last.step, layer, last.num_tokens, trips.last_s)
                pair.window.sent(lane.stream, exchange)
            stages = Stage.DISPATCH_POSTED, Stage.COMBINE_ARRIVED
        else:
            assert isinstance(pair, FfnPair) and trips.num_answered == trips.num_sent, "what was taken is answered"
            stats.received(trips.num_sent, dispatch_bytes)
            stats.sent(trips.num_answered, answer_bytes)
            pair.window.passed(lane.stream, newest.seq)
            stages = Stage.DISPATCH_ARRIVED, Stage.COMBINE_POSTED
        pair.env.trace.record_later(lambda: _records(lane.peer, last, trips, *stages))

    def _only_pair(self, peer: RankId) -> Pair | None:
        """The pair with `peer`, where nobody else could be kept waiting."""
        live = self._roster.live
        return live[0] if len(live) == 1 and live[0].peer == peer and not self._roster.events else None

    def _lane_of(self, pair: Pair, stream: int) -> Lane | None:
        """The stream's lane, if the channel and the frames are such that native code can judge them."""
        lane = pair.lanes.get(stream)
        if lane is None and not pair.env.config.checksum and (memory := pair.channel.lane(stream)) is not None:
            lane = pair.lanes[stream] = Lane(pair.peer, stream, memory, pair.rules)
        return lane


def _records(peer: RankId, last: Header, trips: Trips, begun: Stage, answered: Stage) -> Iterator[Record]:
    """Records of the exchanges behind `last`, by what their times are."""
    for idx, (begun_s, answered_s) in enumerate(trips.times(), 1):
        where = (peer, last.stream, last.layer + idx & BEFORE_FIRST, last.seq + idx)
        yield (begun_s, begun, *where)
        if answered_s is not None:
            yield (answered_s, answered, *where)


def _of_gang(header: Header, named: CombineMeta) -> Header:
    mask = named.member_mask
    return header._replace(gang_id=named.gang_id, member_mask_low=mask & _LOW64, member_mask_high=mask >> 64)
