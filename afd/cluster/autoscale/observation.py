"""Makes one observation of two answers of the coordinator: counters become shares of the time between them. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from afd.cluster.autoscale.decision import Observation
from afd.messages.membership import MemberStatus, StatusReply

MIN_INTERVAL_S = 0.5


class Observer:
    """Keeps the counters of the answer before. A worker counts from its second answer on."""

    def __init__(self) -> None:
        self._before: dict[str, float] = {}
        self._before_s: float | None = None

    def observe(self, reply: StatusReply, now: float) -> Observation | None:
        """Shares since the last reply; None = nothing to compare with yet, or no worker of a kind was seen twice."""
        busy = {
            status.member.info.incarnation: status.stats["busy_s"]
            for status in reply.members
            if "busy_s" in status.stats
        }
        before, before_s = self._before, self._before_s
        if before_s is not None and now - before_s < MIN_INTERVAL_S:
            return None
        self._before, self._before_s = busy, now
        if before_s is None:
            return None
        shares = {
            key: min(1.0, max(0.0, (value - before[key]) / (now - before_s)))
            for key, value in busy.items()
            if key in before
        }
        attention, ffn, gateways = (_of_role(reply, role) for role in ("attention", "ffn", "gateway"))
        attention_busy, ffn_busy = _mean(shares, attention), _mean(shares, ffn)
        if attention_busy is None or ffn_busy is None:
            return None
        return Observation(
            num_attention=sum(not status.member.draining for status in attention),
            num_ffn=len(ffn),
            attention_busy=attention_busy,
            ffn_busy=ffn_busy,
            kv_used=1.0 - min((status.stats.get("kv_free", 1.0) for status in attention), default=1.0),
            queued=int(_sum(gateways, "queued") + _sum(attention, "waiting")),
            num_finished=int(_sum(gateways, "finished")),
            tpot_p99_s=max((status.stats.get("tpot_p99_ms", 0.0) for status in gateways), default=0.0) / 1e3,
            ttft_p99_s=max((status.stats.get("ttft_p99_ms", 0.0) for status in gateways), default=0.0) / 1e3,
        )


def _of_role(reply: StatusReply, role: str) -> list[MemberStatus]:
    return [status for status in reply.members if status.member.info.role == role]


def _mean(shares: dict[str, float], members: Iterable[MemberStatus]) -> float | None:
    known = [shares[key] for status in members if (key := status.member.info.incarnation) in shares]
    return sum(known) / len(known) if known else None


def _sum(members: Iterable[MemberStatus], key: str) -> float:
    return sum(status.stats.get(key, 0.0) for status in members)
