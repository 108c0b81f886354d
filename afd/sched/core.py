"""The attention worker's protocol: what gateways ask and are answered, when the worker serves, when it gives up.

Pure: messages, commits and `now` come in; messages for gateways go out through `take_outbox`. No socket, tensor, thread
or clock. The engine (or the simulator) takes its steps from `core.scheduler` and books them there; what a step brought
comes back through `committed`, and becomes messages at the next `publish`, so that the next step's first rows may leave
before. One thread calls all of it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from afd.messages.membership import ClusterView, StepCosts
from afd.messages.serving import (
    Abort,
    GatewayMessage,
    Lease,
    Refused,
    Resend,
    Submit,
    TokenChunk,
    WorkerMessage,
    WorkerStats,
    lease_identity,
)
from afd.sched.leases import Leases
from afd.sched.ledger import Ledger
from afd.sched.policy import Admission
from afd.sched.report import CostReporter, worker_stats
from afd.sched.scheduler import SUSPECT, Scheduler
from afd.sched.sequence import Output, Sequence
from afd.sched.streams import StreamChooser
from afd.sched.submission import admit
from afd.sched.trial_turn import TrialTurn
from afd.types import FinishReason

log = logging.getLogger(__name__)

MAX_TPOT_S = 1e4
MAX_ID_CHARS = 256
MAX_INTERRUPTIONS = SUSPECT + 1
STATS_MIN_S, STATS_MAX_S = 0.1, 0.5  # between two reports: when something has changed, and anyhow
CHECK_S = 60.0  # at least, between two checks of the idle scheduler's books


@dataclass(frozen=True, slots=True)
class CoreLimits:
    """Bounds of one worker."""

    vocab_size: int
    """Token ids from there on are none of the model's."""
    max_waiting: int
    """Requests that may wait for a place."""
    recovery_timeout_s: float
    """How long requests wait for FFN workers that are out of reach."""


class WorkerCore:
    """Owns the worker's requests, from submission to the last token.

    costs: of the newest report, for the coordinator; None before, and always without a reporter.
    """

    def __init__(
        self,
        rank: int,
        scheduler: Scheduler,
        admission: Admission,
        limits: CoreLimits,
        *,
        chooser: StreamChooser | None = None,
        reporter: CostReporter | None = None,
    ):
        """chooser: of the number of streams; None = it stays.
        reporter: of costs; None = nobody plans with them.
        """
        self.rank = rank
        self.scheduler = scheduler
        self.admission = admission
        self.ready = False
        self.why_not_ready = "not ready"
        self.draining = False
        self.costs: StepCosts | None = None
        self._limits = limits
        self._chooser = chooser
        self._reporter = reporter
        self._ledger = Ledger()
        self._leases = Leases()
        self._outbox: list[tuple[bytes, WorkerMessage]] = []
        self._news: list[Output] = []
        self._num_arrivals = 0
        self._others_serve = False
        self._turn = TrialTurn()
        self._max_streams = scheduler.num_streams
        self._patience_until_s: float | None = None  # while FFN workers are out of reach
        self._stats: WorkerStats | None = None
        self._stats_due_s = self._stats_overdue_s = 0.0
        self._check_due_s = 0.0
        self._checked_step = 0

    # -- what comes in ------------------------------------------------------------------------------------

    def receive(self, gateway: bytes, message: GatewayMessage, now: float) -> None:
        """One message. gateway: the identity of the connection that it came over."""
        if isinstance(message, Lease):
            own = gateway == lease_identity(message.gateway)
            self._leases.renew(message.gateway.encode() if own else gateway, message.ttl_s, now)
            if message.live_req_ids is not None:
                self._keep(gateway, message.live_req_ids)
            return
        self._leases.met(gateway, now)
        if isinstance(message, Submit):
            self._submit(gateway, message, now)
        elif isinstance(message, Abort):
            for req_id in message.req_ids:
                self._drop(req_id)
        elif not self._ledger.resend(message.req_id, message.attempt, message.from_idx):
            detail = "the worker does not know this attempt: its submission was lost, or it ended long ago"
            self._refuse(gateway, message, "unknown", detail)

    def tick(self, now: float) -> None:
        """Call it many times a second, after `receive`: ended leases, and FFN workers that did not come back.

        Raises AssertionError if a block or a sequence got lost: found while idle, when a new start costs no token.
        """
        for gateway in self._leases.ended(now):
            num_aborted = self._keep(gateway, ())
            log.warning("a gateway went silent: %d of its requests aborted", num_aborted)
        if not self.ready and self._patience_until_s is not None and now >= self._patience_until_s:
            self._give_up()
        self.scheduler.trials_open = self._turn.is_open(now)
        step = self.scheduler.num_steps
        if self.scheduler.idle and step != self._checked_step and now >= self._check_due_s:
            self._checked_step, self._check_due_s = step, now + CHECK_S
            self.scheduler.check()

    def stood_still(self, seconds: float) -> None:
        """This process did not look for so long: an FFN worker that came back meanwhile has not been seen yet."""
        if self._patience_until_s is not None:
            self._patience_until_s += seconds

    def adopt(self, view: ClusterView) -> None:
        """A new view of the cluster: its plan counts from each stream's next step on."""
        ranks = [member.rank for member in view.of_role("attention")]
        self._turn.follow(sum(rank < self.rank for rank in ranks), len(ranks))
        others = (member for member in view.of_role("attention") if member.rank != self.rank)
        self._others_serve = any(member.ready and not member.draining for member in others)
        self._max_streams = view.plan.max_streams
        self.scheduler.limit_step(view.plan.max_step_tokens)

    def set_ready(self, ready: bool, why_not: str, now: float) -> None:
        """Whether every FFN worker can be reached, and why not."""
        if ready and not self.ready:
            self._turn.begin(now)
        self.ready, self.why_not_ready = ready, "" if ready else why_not
        if ready:
            self._patience_until_s = None
        else:
            self._wait_from(now)

    def drain(self) -> None:
        """Take no new request from now on."""
        self.draining = True

    # -- steps --------------------------------------------------------------------------------------------

    def committed(self, outputs: Iterable[Output]) -> None:
        """What a step brought, in order of commits; see `publish`."""
        self._news.extend(outputs)

    def interrupted(self, reason: str, now: float) -> None:
        """The steps in flight were lost with an FFN worker, and have been booked as failed.

        A request that was lost MAX_INTERRUPTIONS times in a row, the last time with nothing beside it, is not tried
        again.
        """
        self._wait_from(now)
        guilty = [seq for seq in self.scheduler.sequences() if seq.num_interrupted >= MAX_INTERRUPTIONS]
        if guilty:
            self._post_news()
        for seq in guilty:
            self._end(seq, f"its step was interrupted {seq.num_interrupted} times: {reason}", retryable=False)
        if guilty:
            log.error(
                "a step was interrupted %d times: %d requests ended with an error", MAX_INTERRUPTIONS, len(guilty)
            )

    @property
    def has_news(self) -> bool:
        """True while `publish` has something to do."""
        return bool(self._news)

    def publish(self) -> None:
        """Make messages of what was committed, and choose the number of streams anew."""
        self._post_news()
        self._choose_streams()

    # -- what goes out ------------------------------------------------------------------------------------

    def report(self, now: float) -> None:
        """Tell every gateway the load: when it changed, but not before STATS_MIN_S, and after STATS_MAX_S anyhow."""
        if now < self._stats_due_s:
            return
        stats = worker_stats(self.rank, self.scheduler, self.admission, draining=self.draining, ready=self.ready)
        if stats == self._stats and now < self._stats_overdue_s:
            return
        self._outbox.extend((gateway, stats) for gateway in self._leases)
        self._stats, self._stats_due_s, self._stats_overdue_s = stats, now + STATS_MIN_S, now + STATS_MAX_S
        if self._reporter is not None:
            self.costs = self._reporter.report(now)

    def take_outbox(self) -> list[tuple[bytes, WorkerMessage]]:
        """Messages to be sent, each with its gateway. Call it after anything else here."""
        messages, self._outbox = self._outbox, []
        messages.extend(self._ledger.take_unsent())
        return messages

    # -- details ------------------------------------------------------------------------------------------

    def _submit(self, gateway: bytes, message: Submit, now: float) -> None:
        known = self.scheduler.get(message.req_id)
        if known is not None:
            if known.attempt >= message.attempt:
                return  # a duplicate
            self._drop(message.req_id)
        reason, detail = self._fault(message)
        if reason:
            self._refuse(gateway, message, reason, detail)
            return
        self._num_arrivals += 1
        answer = admit(message, self.admission, owner=gateway, arrival=self._num_arrivals, now=now)
        if isinstance(answer, Refused):
            self._outbox.append((gateway, answer))
            return
        self._ledger.open(message.req_id, gateway, message.attempt, len(message.output_ids))
        self.scheduler.add(answer)

    def _fault(self, message: Submit) -> tuple[str, str]:
        """Why the request cannot be taken, whatever admission says, which counts only what could run: (reason, detail),
        or ("", "").
        """
        limits = self._limits
        if self.draining:
            return "draining", "the worker is shutting down"
        if not self.ready:
            return "not_ready", self.why_not_ready
        if self.scheduler.num_waiting >= limits.max_waiting:
            return "capacity", f"{limits.max_waiting} requests wait already"
        ids = [*message.prompt_ids, *message.output_ids]
        if not message.prompt_ids:
            return "invalid", "the prompt is empty"
        if min(ids) < 0 or max(ids) >= limits.vocab_size:
            return "invalid", f"a token id is outside 0..{limits.vocab_size - 1}"
        if message.sampling.max_tokens <= len(message.output_ids):
            return "invalid", "max_tokens must leave at least one token to generate"
        fault = message.sampling.fault(limits.vocab_size)
        if fault is not None:
            return "invalid", fault
        if not 0.0 <= message.tpot_s <= MAX_TPOT_S:
            return "invalid", f"a TPOT target of {message.tpot_s} s is not in 0..{MAX_TPOT_S:.0f}"
        if len(message.req_id) > MAX_ID_CHARS:
            return "invalid", f"a request id of {len(message.req_id)} characters is longer than {MAX_ID_CHARS}"
        never = self.scheduler.refusal(len(message.prompt_ids), message.sampling.max_tokens)
        return ("invalid", never) if never else ("", "")

    def _refuse(self, gateway: bytes, message: Submit | Resend, reason: str, detail: str) -> None:
        self._outbox.append((gateway, Refused(message.req_id, message.attempt, reason, detail)))

    def _keep(self, gateway: bytes, live_req_ids: Iterable[str]) -> int:
        """Abort what is the gateway's and not among these -> how many."""
        alive = set(live_req_ids)
        dead = [seq.req_id for seq in self.scheduler.sequences() if seq.owner == gateway and seq.req_id not in alive]
        for req_id in dead:
            self._drop(req_id)
        return len(dead)

    def _drop(self, req_id: str) -> None:
        self.scheduler.abort(req_id)
        self._ledger.forget(req_id)

    def _wait_from(self, now: float) -> None:
        """An FFN worker is out of reach, since now if it was not before."""
        if self._patience_until_s is None:
            self._patience_until_s = now + self._limits.recovery_timeout_s

    def _give_up(self) -> None:
        """End every request with an error: nothing is in flight."""
        self._post_news()
        seqs = self.scheduler.sequences()
        for seq in seqs:
            self._end(seq, f"{self.why_not_ready}; no recovery in time", retryable=self._others_serve)
        if seqs:
            log.error("%s: %d requests ended with an error", self.why_not_ready, len(seqs))

    def _end(self, seq: Sequence, error: str, *, retryable: bool) -> None:
        """End a request with an error. retryable: it would fare better at another worker."""
        self.scheduler.abort(seq.req_id, FinishReason.ERROR)
        self._ledger.post(
            TokenChunk(
                seq.req_id,
                seq.attempt,
                seq.num_output,
                [],
                finish=FinishReason.ERROR,
                error=error,
                retryable=retryable,
            )
        )

    def _post_news(self) -> None:
        news, self._news = self._news, []
        for output in news:
            progress = output.progress
            seq = progress.seq
            if progress.finish in (FinishReason.STOP, FinishReason.LENGTH):
                self.admission.finished(seq)
            self._ledger.post(
                TokenChunk(
                    seq.req_id,
                    seq.attempt,
                    progress.first_idx,
                    list(progress.ids),
                    logprobs=None if output.logprobs is None else [output.logprobs],
                    finish=progress.finish,
                    error=output.error,
                    cached_tokens=seq.num_cached,
                    preempted=seq.num_preempted,
                )
            )

    def _choose_streams(self) -> None:
        scheduler, step = self.scheduler, self.scheduler.num_steps
        if self._chooser is None or not self._chooser.due(step):
            return
        current = scheduler.num_streams
        chosen = self._chooser.choose(step, current, self._max_streams, scheduler.num_running, scheduler.full_step())
        if chosen != current:
            scheduler.set_num_streams(chosen)
            log.debug("%d streams instead of %d for %d sequences", chosen, current, scheduler.num_running)
