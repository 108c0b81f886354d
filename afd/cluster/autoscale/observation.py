"""Makes one observation of several answers of the coordinator: counters become rates over the last minute. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

from afd.cluster.autoscale.capacity import CostModel, StepLine, TokenWork, num_ends
from afd.cluster.autoscale.decision import Observation
from afd.messages.membership import MemberStatus, StatusReply
from afd.types import Topology

MIN_INTERVAL_S = 0.5
WINDOW_S = 60.0
MIN_ENDED = 10  # answers that say how long answers are
MOST_ASKED = 4.0  # times what is served: a client that was turned away may ask again and again
SMOOTH = 0.1  # weight of the newest costs
COUNTERS = ("busy_s", "sampled", "rows", "attended", "arrived", "running", "queued", "waiting")

Counts = dict[tuple[str, str], float]  # by incarnation and name
Members = list[MemberStatus]


@dataclass(frozen=True, slots=True)
class _Snapshot:
    at_s: float
    counts: Counts


class Observer:
    """Keeps the counters of the last minute. A worker counts from its second answer on.

    num_streams: of each attention worker; 0 = it chooses.
    """

    def __init__(self, num_streams: int = 0) -> None:
        self._num_streams = num_streams
        self._snapshots: deque[_Snapshot] = deque()
        self._tokens_each = 0.0  # output tokens of an answer; 0 = not known yet
        self._work = TokenWork()
        self._model: CostModel | None = None
        self._num_models = 0
        self._link_s: float | None = None  # of a row's bytes at one end; outlives workers to whom nothing shows it
        self._ffn: dict[int, StepLine] = {}  # of steps, by number of FFN workers

    def observe(self, reply: StatusReply, now: float) -> Observation | None:
        """Rates of the last minute; None = nothing to compare with yet, or no worker of a kind was seen twice."""
        if self._snapshots and now - self._snapshots[-1].at_s < MIN_INTERVAL_S:
            return None
        new = _Snapshot(now, _counts(reply))
        self._snapshots.append(new)
        while now - self._snapshots[0].at_s > WINDOW_S and now - self._snapshots[1].at_s >= WINDOW_S:
            self._snapshots.popleft()
        if len(self._snapshots) < 2:
            return None
        before, window = self._snapshots[-2], self._snapshots[0]
        attention, ffn, gateways = (_of_role(reply, role) for role in ("attention", "ffn", "gateway"))
        attention_busy, ffn_busy = _busy(before, new, attention), _busy(before, new, ffn)
        if attention_busy is None or ffn_busy is None:
            return None
        size = Topology(max(1, sum(not status.member.draining for status in attention)), len(ffn))
        self._learn(window, new, attention, gateways)
        costs = [status.costs for status in attention if status.costs is not None]
        streams = range(self._num_streams or 1, (self._num_streams or reply.view.plan.max_streams) + 1)
        model = self._smooth(CostModel.of(costs, size, self._work, streams))
        if model is not None:
            self._ffn |= model.ffn
            if model.link_row_s is not None:
                self._link_s = model.link_row_s / num_ends(size)
            elif self._link_s is not None:
                model = replace(model, link_row_s=self._link_s * num_ends(size))
            model = replace(model, ffn=dict(self._ffn))
        return Observation(
            size,
            tokens_per_s=self._asked(window, new, attention, gateways) / (now - window.at_s),
            num_running=int(sum(status.stats.get("running", 0.0) for status in attention)),
            num_live=int(sum(status.stats.get(name, 0.0) for status in gateways for name in ("running", "queued"))),
            costs=model,
            kv_used=1.0 - min((status.stats.get("kv_free", 1.0) for status in attention), default=1.0),
            num_finished=int(sum(status.stats.get("finished", 0.0) for status in gateways)),
            tpot_p99_s=_worst(gateways, "tpot_p99_ms") / 1e3,
            ttft_p99_s=_worst(gateways, "ttft_p99_ms") / 1e3,
            attention_busy=attention_busy,
            ffn_busy=ffn_busy,
        )

    def _learn(self, window: _Snapshot, new: _Snapshot, attention: Members, gateways: Members) -> None:
        """How long answers are, and what one of their tokens costs; what was known stays where too few ended."""
        arrived = _growth(window, new, gateways, "arrived")
        running = _growth(window, new, gateways, "running", falls=True)
        queued = _growth(window, new, gateways, "queued", falls=True)
        waiting = _growth(window, new, attention, "waiting", falls=True)
        ended, begun = arrived - running - queued, arrived - queued - waiting
        sampled, rows = (_growth(window, new, attention, name) for name in ("sampled", "rows"))
        if min(ended, begun, sampled) < MIN_ENDED:
            return
        joined = running - waiting  # they are halfway through, on average
        self._tokens_each = sampled / (ended + joined / 2.0)
        rows_each = 1.0 + max(0.0, rows - sampled) / begun / self._tokens_each  # those of prompts are of who has begun
        self._work = TokenWork(rows_each, rows_each * _growth(window, new, attention, "attended") / rows)

    def _smooth(self, model: CostModel | None) -> CostModel | None:
        """The mean over about the last ten answers: a worker's curves follow its newest steps closely."""
        if model is None:
            return None
        if self._model is None or self._model.size != model.size:
            self._num_models, self._model = 0, model
        self._num_models += 1
        self._model = model.blended(self._model, max(SMOOTH, 1.0 / self._num_models))
        return self._model

    def _asked(self, window: _Snapshot, new: _Snapshot, attention: Members, gateways: Members) -> float:
        """Output tokens that those who arrived will be given, or would be."""
        sampled = _growth(window, new, attention, "sampled")
        if not self._tokens_each or not sampled:
            return sampled
        return min(MOST_ASKED * sampled, self._tokens_each * _growth(window, new, gateways, "arrived"))


def _counts(reply: StatusReply) -> Counts:
    return {
        (status.member.info.incarnation, name): status.stats[name]
        for status in reply.members
        for name in COUNTERS
        if name in status.stats
    }


def _of_role(reply: StatusReply, role: str) -> list[MemberStatus]:
    return [status for status in reply.members if status.member.info.role == role]


def _growth(
    old: _Snapshot, new: _Snapshot, members: Iterable[MemberStatus], name: str, *, falls: bool = False
) -> float:
    """How much a figure of the members in both snapshots has grown, all together. falls: it is no counter."""
    keys = [(status.member.info.incarnation, name) for status in members]
    grown = [new.counts[key] - old.counts[key] for key in keys if key in old.counts and key in new.counts]
    return sum(grown if falls else (max(0.0, value) for value in grown))


def _busy(old: _Snapshot, new: _Snapshot, members: list[MemberStatus]) -> float | None:
    """Mean share of the time; None where nobody was seen twice."""
    num_known = sum((status.member.info.incarnation, "busy_s") in old.counts for status in members)
    if not num_known:
        return None
    return min(1.0, _growth(old, new, members, "busy_s") / num_known / (new.at_s - old.at_s))


def _worst(members: Iterable[MemberStatus], key: str) -> float:
    return max((status.stats.get(key, 0.0) for status in members), default=0.0)
