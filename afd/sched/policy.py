"""Admission under the SLA: who may start, how much prefill a step may hold, when the next place will be free. Pure.

A request is admitted when, with every admitted sequence at its predicted final length, one decode each and the smallest
chunk of prefill for those that prefill, the predicted cycle still holds the tightest TPOT target among them. The cycle
is shared, so one number decides for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from afd.sched.forecast import LengthForecast
from afd.sched.latency import LatencyModel, StepLoad, attended
from afd.sched.scheduler import Scheduler
from afd.sched.sequence import Sequence as Request
from afd.types import SamplingParams

Policy = Literal["enforce", "observe", "off"]

HEADROOM = 0.9  # share of a target that may be planned with: the rest is for what no model knows
NEVER_S = 60.0  # retry_after of a request for which no departure makes room
SIZE_EMA = 0.2
INTERVAL_EMA = 0.05
LINE_S = 0.3  # a refused request that asks again so soon keeps its place before smaller ones that came later
MAX_LINE = 32
LINE_WAIT_S = 1.0  # nobody is held back for a request whose place is farther away
SATURATED_S = 1.0  # so long after a refusal an admission still means that a place became free


@dataclass(frozen=True, slots=True)
class Ask:
    """What admission knows of a request before it runs.

    num_output: tokens of earlier attempts that come with it.  tpot_s: its own target; 0 = the cluster's.
    resumed: it ran elsewhere before, so it is not new: only want of KV space refuses it.
    """

    req_id: str
    num_prompt: int
    sampling: SamplingParams
    num_output: int = 0
    tpot_s: float = 0.0
    priority: int = 0
    resumed: bool = False


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request may not start now, and when it probably may."""

    detail: str
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class Outlook:
    """What the worker tells the gateways.

    wait_s: until a typical request would be admitted; 0 = now.  place_interval_s: between two places while full;
    0 = not known.  prefill_token_s: from a place to the first token, per token of the prompt.
    headroom_s: the tightest target less the predicted cycle.  cycle_s: with all that is admitted.
    """

    wait_s: float
    place_interval_s: float
    prefill_token_s: float
    headroom_s: float
    cycle_s: float


@dataclass(slots=True)
class _Share:
    """One sequence's part in every cycle: a decode at its final length, and while it prefills a chunk.

    context: KV entries that the decode reads.  chunk, chunk_context: tokens and KV entries of a prefill chunk.
    num_chunks: cycles of prefill ahead of it.  num_left: output tokens to come.
    num_blocks: KV blocks that it still has to get.  num_held: those it has.
    """

    context: int
    chunk: int
    chunk_context: float
    num_chunks: int
    num_left: int
    num_blocks: int
    num_held: int
    target_s: float


@dataclass(slots=True)
class _Waiting:
    """A request that was refused. It holds others back once it has asked again. rank_key: lower comes first."""

    rank_key: tuple[int, int]
    share: _Share
    asked_at: float
    num_asked: int = 1


class Admission:
    """Beside the scheduler whose sequences it counts; the worker's main thread calls it.

    num_refused: decisions against a request; with `observe` those requests were admitted all the same.
    """

    def __init__(self, scheduler: Scheduler, model: LatencyModel, *, policy: Policy, tpot_s: float):
        self.policy = policy
        self._scheduler = scheduler
        self._model = model
        self._tpot_s = tpot_s
        self._lengths = LengthForecast()
        self._typical: tuple[float, float] | None = None  # prompt and planned output tokens of recent requests
        self._refused_at = self._admitted_at = float("-inf")
        self._place_interval_s = 0.0
        self._num_intervals = 0
        self._line: dict[str, _Waiting] = {}
        self._num_refusals = 0
        self.num_admitted = 0
        self.num_refused = 0
        self.cycle_s = 0.0  # of the last `outlook`, for other threads

    def target_of(self, tpot_s: float) -> float:
        """The TPOT target of a request that asked for `tpot_s` (0 = it said nothing)."""
        return tpot_s or self._tpot_s

    def judge(self, ask: Ask, now: float) -> Refusal | None:
        """None: it is admitted, and the caller adds it to the scheduler. Call once per submission."""
        if self.policy == "off":
            return None
        self._note_size(ask)
        shares = [self._share_of(seq) for seq in self._scheduler.sequences()]
        candidate = self._candidate(ask)
        ahead = [] if ask.resumed else self._ahead_of(ask, now)
        idle = not shares and not ahead and candidate.target_s >= self._tpot_s
        # An idle worker takes it: nobody is hurt, and only what runs can correct a pessimistic model.
        obstacle = None if idle else self._obstacle([*shares, *ahead, candidate], new=not ask.resumed)
        if obstacle is not None:
            self.num_refused += 1
            self._refused_at = now
            if self.policy == "enforce":
                wait_s = self._wait_s(shares, candidate, new=not ask.resumed)
                if wait_s <= LINE_WAIT_S and candidate.target_s >= self._tpot_s and not ask.resumed:
                    self._line_up(ask, candidate, now)
                return Refusal(obstacle, wait_s)
        self._line.pop(ask.req_id, None)
        self._note_place(now)
        self.num_admitted += 1
        return None

    def finished(self, seq: Request) -> None:
        """A sequence ended by itself (stop token or length)."""
        self._lengths.add(seq.num_output)

    def outlook(self) -> Outlook:
        """For the gateways, a few times a second: its cost grows with the number of sequences.

        Nothing with policy off; no wait with observe, which makes nobody wait.
        """
        if self.policy == "off":
            return Outlook(0.0, 0.0, 0.0, 0.0, 0.0)
        shares = [self._share_of(seq) for seq in self._scheduler.sequences()]
        cycle_s = self.cycle_s = self._cycle_s(shares)
        target_s = min([self._tpot_s, *(share.target_s for share in shares)])
        wait_s = interval_s = prefill_token_s = 0.0
        if shares and self._typical is not None and self.policy == "enforce":
            num_prompt, num_output = (round(value) for value in self._typical)
            wait_s = self._wait_s(shares, self._share(num_prompt, 0, num_output, held=0, target_s=self._tpot_s))
            prefill_token_s = self._prefill_token_s(shares, target_s)
            # Before it was seen: places come as sequences end, and no faster than their successors are prefilled.
            expected_s = max(cycle_s * num_output / len(shares), prefill_token_s * num_prompt)
            interval_s = self._place_interval_s or expected_s
        return Outlook(wait_s, interval_s, prefill_token_s, target_s - cycle_s, cycle_s)

    # -- decisions ----------------------------------------------------------------------------------------

    def _ahead_of(self, ask: Ask, now: float) -> list[_Share]:
        """Who was refused before it and still asks: small requests shall not pass a large one until it gives up."""
        self._line = {req_id: other for req_id, other in self._line.items() if now - other.asked_at <= LINE_S}
        own = self._line.get(ask.req_id)
        rank_key = own.rank_key if own is not None else (ask.priority, self._num_refusals + 1)
        return [other.share for other in self._line.values() if other.num_asked > 1 and other.rank_key < rank_key]

    def _line_up(self, ask: Ask, candidate: _Share, now: float) -> None:
        self._num_refusals += 1
        own = self._line.get(ask.req_id)
        if own is not None:
            own.asked_at, own.share, own.num_asked = now, candidate, own.num_asked + 1
        elif len(self._line) < MAX_LINE:
            self._line[ask.req_id] = _Waiting((ask.priority, self._num_refusals), candidate, now)

    def _obstacle(self, shares: Sequence[_Share], *, new: bool, num_freed: int = 0) -> str | None:
        """Why these sequences cannot all be served as promised, or None. num_freed: blocks free by then besides."""
        config, pool, step_tokens = self._scheduler.config, self._scheduler.pool, self._scheduler.max_step_tokens
        if sum(share.num_blocks for share in shares) > pool.num_free + num_freed:
            return f"the KV cache of {pool.num_blocks} blocks is spoken for"
        if not new:
            return None
        if len(shares) > config.max_num_seqs:
            return f"{config.max_num_seqs} requests run already (attention.max_num_seqs)"
        num_streams = min(len(shares), self._scheduler.num_streams)
        if len(shares) + sum(share.chunk for share in shares) > num_streams * step_tokens:
            return f"steps of {step_tokens} tokens are full (attention.max_step_tokens)"
        cycle_s, target_s = self._cycle_s(shares), min(share.target_s for share in shares)
        if cycle_s > HEADROOM * target_s:
            return (
                f"a token would take {cycle_s * 1e3:.1f} ms with this request; the tightest target here is "
                f"{target_s * 1e3:.0f} ms, planned to {HEADROOM:.0%}"
            )
        return None

    def _wait_s(self, shares: Sequence[_Share], candidate: _Share, *, new: bool = True) -> float:
        """Seconds until the candidate fits, with the others ending their prefill and leaving as predicted."""
        events = [(share.num_chunks, idx, False) for idx, share in enumerate(shares) if share.num_chunks]
        events += [(share.num_chunks + share.num_left, idx, True) for idx, share in enumerate(shares)]
        events.sort()

        def fits_after(num_events: int) -> bool:
            then: list[_Share | None] = list(shares)
            num_freed = 0
            for _, idx, leaves in events[:num_events]:
                share = then[idx]
                assert share is not None
                then[idx] = None if leaves else replace(share, chunk=0, chunk_context=0.0)
                num_freed += share.num_held if leaves else 0
            rest = [share for share in then if share is not None]
            return self._obstacle([*rest, candidate], new=new, num_freed=num_freed) is None

        if fits_after(0):
            return 0.0
        cycle_s = self._cycle_s(shares)
        if not fits_after(len(events)):
            return NEVER_S
        low, high = 0, len(events)  # does not fit after `low`, fits after `high`
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits_after(middle) else (middle, high)
        return max(1, events[high - 1][0]) * cycle_s

    # -- sizes --------------------------------------------------------------------------------------------

    def _cycle_s(self, shares: Sequence[_Share]) -> float:
        """With the scheduler's streams and an even split, which the scheduler keeps to."""
        if not shares:
            return 0.0
        context = sum(share.context + share.chunk_context for share in shares)
        total = StepLoad(len(shares) + sum(share.chunk for share in shares), context, len(shares))
        num_streams = min(len(shares), self._scheduler.num_streams)
        return self._model.cycle_s([total.split(num_streams)] * num_streams)

    def _prefill_token_s(self, shares: Sequence[_Share], target_s: float) -> float:
        """Cycles at the target, whose room for prefill one more request shares with those that prefill."""
        config = self._scheduler.config
        num_streams = min(len(shares), self._scheduler.num_streams)
        decodes = StepLoad(len(shares), sum(share.context for share in shares), len(shares)).split(num_streams)
        room = PrefillBudget(self._model).prefill_tokens(
            [decodes] * num_streams, 0, target_s, start=0, limit=self._scheduler.max_step_tokens
        )
        num_prefills = 1 + sum(share.num_chunks > 0 for share in shares)
        return HEADROOM * target_s / max(config.min_chunk_tokens, room / num_prefills)

    def _candidate(self, ask: Ask) -> _Share:
        num_left = self._lengths.final_output(ask.sampling, ask.num_output) - ask.num_output
        target_s = self.target_of(ask.tpot_s)
        return self._share(ask.num_prompt + ask.num_output, 0, num_left, held=0, target_s=target_s)

    def _share_of(self, seq: Request) -> _Share:
        num_left = max(1, self._lengths.final_output(seq.sampling, seq.num_output) - seq.num_output)
        target_s = self.target_of(seq.tpot_s)
        return self._share(len(seq.tokens), seq.num_computed, num_left, held=len(seq.blocks), target_s=target_s)

    def _share(self, num_tokens: int, num_computed: int, num_left: int, *, held: int, target_s: float) -> _Share:
        num_pending = num_tokens - num_computed
        chunk, chunk_context, num_chunks = 0, 0.0, 0
        if num_pending > 1:
            chunk = min(self._scheduler.config.min_chunk_tokens, num_pending)
            chunk_context = attended(num_tokens - chunk, chunk)
            num_chunks = -(-num_pending // chunk)
        final = num_tokens + num_left
        num_blocks = max(0, self._scheduler.pool.blocks_for(final) - held)
        return _Share(final, chunk, chunk_context, num_chunks, num_left, num_blocks, held, target_s)

    # -- what was seen ------------------------------------------------------------------------------------

    def _note_size(self, ask: Ask) -> None:
        size = (float(ask.num_prompt), float(self._lengths.final_output(ask.sampling, ask.num_output)))
        old = self._typical or size
        self._typical = (old[0] + SIZE_EMA * (size[0] - old[0]), old[1] + SIZE_EMA * (size[1] - old[1]))

    def _note_place(self, now: float) -> None:
        """While full, the time between two admissions is the time between two places."""
        interval_s = now - self._admitted_at
        self._admitted_at = now
        if now - self._refused_at > SATURATED_S or interval_s > 10 * SATURATED_S:
            return
        self._num_intervals += 1
        weight = max(INTERVAL_EMA, 1.0 / self._num_intervals)
        self._place_interval_s += weight * (interval_s - self._place_interval_s)


class PrefillBudget:
    """How many prefill tokens a step may hold beside the decodes that run. A `PrefillPace` of the scheduler."""

    def __init__(self, model: LatencyModel):
        self._model = model

    def prefill_tokens(self, streams: Sequence[StepLoad], stream: int, target_s: float, start: int, limit: int) -> int:
        """Most tokens from position `start` on, at most `limit`, that stream's step can add within the target."""

        def fits(num_tokens: int) -> bool:
            added = StepLoad(num_tokens, attended(start, num_tokens), 1)
            loads = [load.plus(added) if idx == stream else load for idx, load in enumerate(streams)]
            return self._model.cycle_s(loads) <= HEADROOM * target_s

        if fits(limit):
            return limit
        low, high = 0, limit  # fits (or is the least there is), does not fit
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low
