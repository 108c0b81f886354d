"""Admission under the SLA: who may start, and when the next place will be free. Pure.

A request is admitted when, with one decode of every admitted sequence at its predicted final length, the predicted
cycle still holds the tightest TPOT target among them (the cycle is shared, so one number decides for all); and when the
prompts before it, in what those cycles leave for prefill, do not keep it from its first token.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

from afd.messages.serving import NEVER_S, PLACE_RANKS
from afd.sched.forecast import LengthForecast
from afd.sched.largest import largest
from afd.sched.latency import LatencyModel, StepLoad
from afd.sched.places import places_s
from afd.sched.prefill import PrefillBudget
from afd.sched.rules import HEADROOM
from afd.sched.scheduler import MAX_PAUSES, Scheduler
from afd.sched.sequence import Sequence as Request
from afd.types import SamplingParams

Policy = Literal["enforce", "observe", "off"]

BACKLOG = 0.1  # share of the TTFT target that prompts before a new one may take here; the rest waits at the gateway
ALONE = 1.5  # a prompt may take so many times as long beside others as alone
SIZE_EMA = 0.2
LINE_S = 0.3  # a refused request that asks again so soon keeps its place before smaller ones that came later
MAX_LINE = 32
NUM_OUTLOOKS = 15  # over which what gateways are told is smoothed: one and a half seconds of them
MIN_PLACES = 32  # that gateways are told of
LOOK_AHEAD = 2  # times as many places as sequences run
LAST = len(PLACE_RANKS) - 1
LINE_WAIT_S = 1.0  # nobody is held back for a request whose place is farther away


@dataclass(frozen=True, slots=True)
class Ask:
    """What admission knows of a request before it runs.

    num_output: tokens of earlier attempts that come with it.
    tpot_s: its own target; 0 = the cluster's.
    first_due_s: seconds until its first token is due; 0 = the cluster's TTFT target from now on.
    resumed: it ran elsewhere before, so it is not new: only want of KV space refuses it.
    """

    req_id: str
    num_prompt: int
    sampling: SamplingParams
    num_output: int = 0
    tpot_s: float = 0.0
    first_due_s: float = 0.0
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

    places_s: until typical requests would be admitted, one after another: those of PLACE_RANKS; empty = all now.
    prefill_token_s: from a place to the first token, per token of the prompt, beside what runs.
    """

    places_s: tuple[float, ...]
    prefill_token_s: float


@dataclass(slots=True)
class _Share:
    """One sequence's part in the cycles to come: a decode at its final length, and until then its prefill.

    context: KV entries that the decode reads.
    num_pending: prompt tokens to be computed; 0 = it decodes.
    num_left: output tokens to come.
    num_blocks: KV blocks that it still has to get.
    num_held: those it has.
    """

    context: int
    num_pending: int
    num_left: int
    num_blocks: int
    num_held: int
    target_s: float


@dataclass(slots=True)
class _Crowd:
    """Sequences that run together: sums over their shares, and the tightest target among them."""

    target_s: float = math.inf
    num_seqs: int = 0
    context: int = 0
    num_pending: int = 0
    num_blocks: int = 0

    def add(self, share: _Share, num: int = 1) -> None:
        """`num` sequences with such a share come to it."""
        self.target_s = min(self.target_s, share.target_s)
        self.num_seqs += num
        self.context += num * share.context
        self.num_pending += num * share.num_pending
        self.num_blocks += num * share.num_blocks


@dataclass(frozen=True, slots=True)
class _Pace:
    """Cycles that are filled up with prefill.

    cycle_s: of one of them.
    token_s: for each prefill token.
    """

    cycle_s: float
    token_s: float


@dataclass(frozen=True, slots=True)
class _Course:
    """What becomes of the sequences that run, if nobody comes. pace: of prefill until their prompts are computed.

    cycle_s: of their decodes alone.
    computed_s, left_s: seconds until each has computed its prompt, and has left.
    """

    shares: Sequence[_Share]
    crowd: _Crowd
    pace: _Pace
    cycle_s: float
    computed_s: list[float]
    left_s: list[float]


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

    def __init__(self, scheduler: Scheduler, model: LatencyModel, *, policy: Policy, tpot_s: float, ttft_s: float):
        self.policy = policy
        self._scheduler = scheduler
        self._model = model
        self._budget = PrefillBudget(model)
        self._tpot_s = tpot_s
        self._ttft_s = ttft_s
        self._lengths = LengthForecast()
        self._typical: tuple[float, float] | None = None  # prompt and planned output tokens of recent requests
        self._line: dict[str, _Waiting] = {}
        self._outlooks: deque[tuple[tuple[float, ...], float]] = deque(maxlen=NUM_OUTLOOKS)
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
        due_s = ask.first_due_s or self._ttft_s
        # An idle worker takes it: nobody is hurt, and only what runs can correct a pessimistic model.
        crowd = self._crowd([*shares, *ahead])
        obstacle = None if idle else self._obstacle(crowd, candidate, due_s, new=not ask.resumed)
        if obstacle is not None:
            self.num_refused += 1
            if self.policy == "enforce":
                running = self._crowd(shares)
                course = self._course(shares, running, self._cycle_s(running), candidate.num_pending)
                wait_s = self._wait_s(course, candidate, new=not ask.resumed)
                if wait_s <= LINE_WAIT_S and candidate.target_s >= self._tpot_s and not ask.resumed:
                    self._line_up(ask, candidate, now)
                return Refusal(obstacle, wait_s)
        self._line.pop(ask.req_id, None)
        self.num_admitted += 1
        return None

    def finished(self, seq: Request) -> None:
        """A sequence ended by itself (stop token or length)."""
        self._lengths.add(seq.num_output)

    def outlook(self) -> Outlook:
        """What gateways are told a few times a second; the cost grows with the number of sequences.

        Nothing with policy off; no wait with observe, which makes nobody wait.
        """
        if self.policy == "off":
            return Outlook((), 0.0)
        shares = [self._share_of(seq) for seq in self._scheduler.sequences()]
        crowd = self._crowd(shares)
        cycle_s = self.cycle_s = self._cycle_s(crowd)
        places: tuple[float, ...] = ()
        prefill_token_s = 0.0
        if shares and self._typical is not None and self.policy == "enforce":
            num_prompt, num_output = (round(value) for value in self._typical)
            typical = self._share(num_prompt, 0, num_output, held=0, target_s=self._tpot_s)
            course = self._course(shares, crowd, cycle_s, typical.num_pending)
            places, prefill_token_s = self._usual(self._places_s(course, typical), course.pace)
        return Outlook(places, prefill_token_s)

    # -- decisions ----------------------------------------------------------------------------------------

    def _ahead_of(self, ask: Ask, now: float) -> list[_Share]:
        """Who was refused before it and still asks: small requests do not pass a large one until it gives up."""
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

    def _obstacle(
        self,
        crowd: _Crowd,
        candidate: _Share,
        due_s: float,
        *,
        new: bool,
        num_freed: int = 0,
        pace: _Pace | None = None,
        most_s: float = 0.0,
    ) -> str | None:
        """Why the candidate cannot be served as promised beside the crowd, which it is added to; or None.

        due_s: seconds until its first token is due.
        num_freed: blocks free by then besides.
        pace: of prefill beside them, if it was found out before.
        most_s: a cycle that is no obstacle although it is beyond the target.
        """
        num_before = crowd.num_pending
        crowd.add(candidate)
        if not new:
            return self._blocks_obstacle(crowd, num_freed)
        obstacle = self._decode_obstacle(crowd, num_freed, most_s)
        if obstacle is not None:
            return obstacle
        token_s = (pace or self._pace(crowd, candidate.num_pending)).token_s
        return self._prefill_obstacle(num_before, candidate.num_pending, token_s, due_s)

    def _blocks_obstacle(self, crowd: _Crowd, num_freed: int = 0) -> str | None:
        """Why the KV cache has no room for all of the crowd, or None."""
        pool = self._scheduler.pool
        if crowd.num_blocks > pool.num_free + num_freed:
            return f"the KV cache of {pool.num_blocks} blocks is spoken for"
        return None

    def _decode_obstacle(self, crowd: _Crowd, num_freed: int = 0, most_s: float = 0.0) -> str | None:
        """Why the crowd cannot decode together within its target, or None; num_freed and most_s as in `_obstacle`."""
        config, step_tokens = self._scheduler.config, self._scheduler.config.max_step_tokens
        obstacle = self._blocks_obstacle(crowd, num_freed)
        if obstacle is not None:
            return obstacle
        if crowd.num_seqs > config.max_num_seqs:
            return f"{config.max_num_seqs} requests run already (attention.max_num_seqs)"
        if crowd.num_seqs + config.min_chunk_tokens > min(crowd.num_seqs, self._scheduler.num_streams) * step_tokens:
            return f"steps of {step_tokens} tokens are full (attention.max_step_tokens)"
        cycle_s = self._cycle_s(crowd)
        if cycle_s > max(HEADROOM * crowd.target_s, most_s):
            return (
                f"a token would take {cycle_s * 1e3:.1f} ms with this request; the tightest target here is "
                f"{crowd.target_s * 1e3:.0f} ms, planned to {HEADROOM:.0%}"
            )
        return None

    def _prefill_obstacle(self, num_before: int, num_own: int, token_s: float, due_s: float) -> str | None:
        """Why its first token would come too late, or because of the prompts before it keep it waiting here."""
        wait_s, own_s = token_s * num_before, token_s * num_own
        if wait_s <= BACKLOG * self._ttft_s:
            if wait_s + own_s <= due_s:
                return None
            # A prompt that is late even alone is not refused for it: no wait would make it shorter.
            alone_s = self._pace(self._crowd([]), num_own).token_s * num_own
            if wait_s + own_s <= ALONE * alone_s:
                return None
        return (
            f"{num_before} prompt tokens come first, which takes {wait_s:.2f} s; this prompt would take {own_s:.2f} s, "
            f"and its first token is due in {due_s:.2f} s"
        )

    def _wait_s(self, course: _Course, candidate: _Share, *, new: bool = True) -> float:
        """Seconds until the candidate fits, with the others ending their prefill and leaving as predicted.

        Who takes the place of another fits: what is believed of a cycle near the target changes from step to step.
        """
        cycle_s, pace, computed_s, left_s = course.cycle_s, course.pace, course.computed_s, course.left_s
        most_s = cycle_s if candidate.target_s >= self._tpot_s else 0.0

        def fits_at(now_s: float) -> bool:
            rest, num_freed = self._crowd([]), 0
            for share, computed, left in zip(course.shares, computed_s, left_s, strict=True):
                if left <= now_s:
                    num_freed += share.num_held
                    continue
                rest.add(share)
                if computed <= now_s:
                    rest.num_pending -= share.num_pending
            obstacle = self._obstacle(
                rest, candidate, self._ttft_s, new=new, num_freed=num_freed, pace=pace, most_s=most_s
            )
            return obstacle is None

        if fits_at(0.0):
            return 0.0
        moments = sorted({*computed_s, *left_s})
        if not moments or not fits_at(moments[-1]):
            welcome = candidate.target_s >= self._tpot_s and candidate.num_blocks <= self._scheduler.pool.num_blocks
            return max([cycle_s, *moments]) if welcome else NEVER_S  # an idle worker lets anybody in: see `judge`
        low, high = -1, len(moments) - 1  # does not fit at `low`, fits at `high`
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits_at(moments[middle]) else (middle, high)
        return max(moments[high], cycle_s)

    def _usual(self, places: tuple[float, ...], pace: _Pace) -> tuple[tuple[float, ...], float]:
        """Medians of what the last outlooks told: near the target, beliefs swing from one step to the next."""
        if not places:
            self._outlooks.clear()
            return (), pace.token_s
        self._outlooks.append((places, pace.token_s))
        all_places, paces = zip(*self._outlooks, strict=True)
        # As far as all of them look: how many are told of follows how many run.
        return tuple(map(median, zip(*all_places, strict=False))), median(paces)

    def _places_s(self, course: _Course, typical: _Share) -> tuple[float, ...]:
        """Seconds until the next requests like `typical` would be admitted, by PLACE_RANKS; empty: all may come now.

        So many that all that run have left by then: a line moves as they do.
        """
        num_ranks = 1 + bisect_left(PLACE_RANKS, max(MIN_PLACES, LOOK_AHEAD * len(course.shares)), hi=LAST)
        count = PLACE_RANKS[num_ranks - 1] + 1
        places = places_s(
            course.left_s,
            num_free=self._num_free(course.crowd, typical, count),
            first_s=self._wait_s(course, typical),
            backlog_s=course.pace.token_s * course.crowd.num_pending,
            prefill_s=course.pace.token_s * typical.num_pending,
            decode_s=typical.num_left * course.cycle_s,
            allowed_s=BACKLOG * self._ttft_s,
            count=count,
        )
        return tuple(places[rank] for rank in PLACE_RANKS[:num_ranks]) if places[-1] else ()

    def _num_free(self, crowd: _Crowd, typical: _Share, most: int) -> int:
        """How many more of them could decode beside the crowd, whatever their prefill takes; at most `most`."""

        def fit(num: int) -> bool:
            together = replace(crowd)
            together.add(typical, num)
            return self._decode_obstacle(together) is None

        return most if fit(most) else largest(most - 1, fit)

    def _course(self, shares: Sequence[_Share], crowd: _Crowd, cycle_s: float, num_prompt: int) -> _Course:
        """What becomes of the crowd of these shares. num_prompt: tokens of a prompt whose computing sets the pace."""
        pace = self._pace(crowd, num_prompt)
        return _Course(shares, crowd, pace, cycle_s, *_departures(shares, pace, cycle_s))

    # -- sizes --------------------------------------------------------------------------------------------

    @staticmethod
    def _crowd(shares: Iterable[_Share]) -> _Crowd:
        crowd = _Crowd()
        for share in shares:
            crowd.add(share)
        return crowd

    def _cycle_s(self, crowd: _Crowd) -> float:
        """A decode of each, with the scheduler's streams and an even split, which the scheduler keeps to."""
        return self._model.cycle_s(self._decodes(crowd))

    def _decodes(self, crowd: _Crowd) -> list[StepLoad]:
        """A decode of each, by stream."""
        num_streams = max(1, min(crowd.num_seqs, self._scheduler.num_streams))
        return [StepLoad(crowd.num_seqs, crowd.context, crowd.num_seqs).split(num_streams)] * num_streams

    def _pace(self, crowd: _Crowd, num_prompt: int) -> _Pace:
        """Cycles in which all of these decode and the rest of the target goes to a prompt of so many tokens.

        Where nothing is left, prefill pauses as long as the scheduler lets it.
        """
        streams, least = self._decodes(crowd), self._scheduler.config.min_chunk_tokens
        limit = max(least, self._scheduler.max_step_tokens - round(streams[0].num_tokens))
        room, middle = float(limit), num_prompt // 2
        if crowd.num_seqs:
            room = self._budget.prefill_tokens(streams, 0, crowd.target_s, middle, limit)
        room = room or least / (MAX_PAUSES + 1)
        streams[0] = streams[0].plus(StepLoad.chunk(middle, room))
        cycle_s = self._model.cycle_s(streams)
        return _Pace(cycle_s, cycle_s / room)

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
        final = num_tokens + num_left
        num_blocks = max(0, self._scheduler.pool.blocks_for(final) - held)
        return _Share(final, num_pending if num_pending > 1 else 0, num_left, num_blocks, held, target_s)

    # -- what was seen ------------------------------------------------------------------------------------

    def _note_size(self, ask: Ask) -> None:
        size = (float(ask.num_prompt), float(self._lengths.final_output(ask.sampling, ask.num_output)))
        old = self._typical or size
        self._typical = (old[0] + SIZE_EMA * (size[0] - old[0]), old[1] + SIZE_EMA * (size[1] - old[1]))


def _departures(shares: Sequence[_Share], pace: _Pace, cycle_s: float) -> tuple[list[float], list[float]]:
    """Seconds until each sequence has computed its prompt, one prompt after another; and until it has left.

    Cycles are full while prompts are computed; cycle_s: of the decodes alone, afterwards.
    """
    backlog_s = pace.token_s * sum(share.num_pending for share in shares)
    computed_s, left_s, now_s = [], [], 0.0
    for share in shares:
        now_s += pace.token_s * share.num_pending
        begun_s = now_s if share.num_pending else 0.0
        slow = min(share.num_left, (backlog_s - begun_s) / pace.cycle_s)
        computed_s.append(begun_s)
        left_s.append(begun_s + slow * pace.cycle_s + (share.num_left - slow) * cycle_s)
    return computed_s, left_s
