"""Which worker runs which sequence, from submission to the last token: routing, queue, refusals, gaps, migration.

Pure: messages, views and `now` come in; messages to workers go out through a `WorkerPort`, output and errors through
each sequence's sink. No socket, clock or task in here; one thread (the event loop's) calls it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from afd.errors import AfdError, PeerLostError, RequestError, UnavailableError
from afd.gateway.admission import AdmissionQueue, Correction, is_too_long, predicted_wait_s, prefill_s
from afd.gateway.counters import DispatchCounters
from afd.gateway.outage import Outage
from afd.gateway.router import Worker, choose_worker
from afd.gateway.sequence import ClientSequence, Delta, Verdict
from afd.messages.membership import ClusterView
from afd.messages.serving import (
    NEVER_S,
    Abort,
    GatewayMessage,
    Lease,
    Refused,
    Resend,
    TokenChunk,
    Tokens,
    WorkerMessage,
    WorkerStats,
)
from afd.types import FinishReason

log = logging.getLogger(__name__)

MIN_SILENCE_S = 1.0  # two reports of a worker
LEASE_INTERVAL_S = 1.0
LIVE_IDS_EVERY = 5  # every so many leases carry the list of live requests
RESEND_INTERVAL_S = 0.25
PROBE_S = 5.0  # a sequence without news for so long is asked after
PROBE_INTERVAL_S = 1.0
COOLING_MIN_S, COOLING_MAX_S = 0.05, 1.0
PAUSE_S = 0.5  # between two ticks: this process stood still, and could hear nobody meanwhile
MAX_LOSSES = 5  # a request that so many workers have failed, or were lost with, is not tried again
MAX_BARREN = 3  # nor one whose workers end so often in a row before they have computed a token of it
CAUTION = 0.9  # a place that is found just in time is no use when the prompt takes longer than predicted
SCOUT = 3.0  # the first in line is not turned away before the forecast says so many times the time that it has


class WorkerError(AfdError):
    """A worker failed this request for good (HTTP 500): its own words."""


class WorkerPort(Protocol):
    """The way to the workers. Calls return at once; what cannot be sent is dropped (the protocol recovers)."""

    def connect(self, key: str, endpoint: str) -> None: ...

    def disconnect(self, key: str) -> None: ...

    def send(self, key: str, message: GatewayMessage) -> None: ...


@dataclass(frozen=True, slots=True)
class DispatchLimits:
    """ttft_s: target of a first token; with `enforce` it is a deadline, else `request_timeout_s` is.

    recovery_timeout_s: how long sequences wait for any worker to serve (again), lost ones for a successor.
    silence_s: a worker that says nothing for so long is lost; it reports twice a second, whatever it computes.
    vocab_size: token ids from there on are none of the model's.
    """

    lease_s: float = 3.0
    max_queue: int = 1024
    ttft_s: float = 5.0
    enforce: bool = False
    request_timeout_s: float = 600.0
    recovery_timeout_s: float = 60.0
    silence_s: float = 5.0
    vocab_size: int = 1 << 31


class Dispatcher:
    def __init__(self, gateway_id: str, limits: DispatchLimits, port: WorkerPort):
        self.limits = limits
        self.workers: dict[str, Worker] = {}
        self.queue = AdmissionQueue(limits.max_queue)
        self.counters = DispatchCounters()
        self._waits, self._prefills = Correction(), Correction(CAUTION)
        self._gateway_id = gateway_id
        self._port = port
        self._num_submitted = 0
        self._ticked_at: float | None = None
        self._probed_at = 0.0
        self._outage = Outage(limits.recovery_timeout_s)

    # --- requests ---------------------------------------------------------------------------------------

    @property
    def serves(self) -> bool:
        """Some worker takes sequences, unless it is full."""
        return any(worker.serving for worker in self.workers.values())

    @property
    def num_arrived(self) -> int:
        """Sequences that clients have asked for since the start; a request that was turned away counts as one."""
        return self.counters.num_taken + self.counters.num_turned_away + len(self.queue)

    def may_recover(self, now: float) -> bool:
        """No worker serves, but one did not long ago: requests wait for its return, or its successor."""
        self._look(now)
        return self._outage.passes(now)

    def _look(self, now: float) -> None:
        self._outage.look(self.serves, now)

    @property
    def num_running(self) -> int:
        """Sequences placed at a worker."""
        return sum(len(worker.active) for worker in self.workers.values())

    def submit(self, sequences: list[ClientSequence], now: float, *, ttft_s: float | None = None) -> None:
        """Take one request's sequences: all or none. UnavailableError when there is no place for them in time."""
        target_s = self.limits.ttft_s if ttft_s is None else ttft_s
        num_prompt = max(len(sequence.prompt_ids) for sequence in sequences)
        patience_s, predicted_s = self._judge(len(sequences), num_prompt, sequences[0].priority, target_s, now)
        for sequence in sequences:
            self._num_submitted += 1
            sequence.order = self._num_submitted
            sequence.created_at = now
            sequence.deadline = now + patience_s
            sequence.first_due_at = now + target_s
            self._line_up(sequence, now, predicted_s)
        self._pump(now)

    def check_room(self, now: float, *, priority: int = 0, ttft_s: float | None = None) -> None:
        """UnavailableError where the queue would refuse a request whatever it asks for: call this before it is read.

        While no worker serves, requests are read all the same: what is wrong with one is told then, too.
        """
        if self.serves:
            self._judge(1, 0, priority, self.limits.ttft_s if ttft_s is None else ttft_s, now)

    def _judge(
        self, num_sequences: int, num_prompt: int, priority: int, target_s: float, now: float
    ) -> tuple[float, float | None]:
        """How long the sequences of a request may wait, and how long they will, as far as anybody predicts it.

        num_prompt: tokens of the longest prompt.
        target_s: until the first token.  UnavailableError: no place in time.
        """
        serving = [worker for worker in self.workers.values() if worker.serving]
        if not serving and not self.may_recover(now):
            raise UnavailableError("no attention worker is serving", code="not_ready")
        if not self.queue.room_for(num_sequences):
            self.counters.rejected_queue_full += 1
            raise UnavailableError(
                f"the queue is full ({len(self.queue)} of {self.queue.max_sequences} sequences wait)",
                retry_after_s=self._wait_of_newcomer_s(),
                code="queue_full",
            )
        patience_s, predicted_s = self.limits.request_timeout_s, None
        if self.limits.enforce:
            reports = _reports(serving)
            own_s = self._prefills.apply(prefill_s(reports, num_prompt))
            patience_s = max(0.1 * target_s, target_s - own_s)
            num_ahead = self.queue.num_ahead(priority)
            # Where nobody waits and a worker has refused nobody, it is asked: it knows, and this is a forecast.
            if serving and (num_ahead or not any(worker.has_room(now) for worker in serving)):
                predicted_s = predicted_wait_s(reports, num_ahead + num_sequences - 1)
                wait_s = self._waits.apply(predicted_s)
                if is_too_long(wait_s, patience_s):
                    self.counters.rejected_ttft += 1
                    raise self._too_late(wait_s, target_s)
        return patience_s, predicted_s

    def abort(self, sequences: Iterable[ClientSequence], now: float) -> None:
        """The client has gone, or its request failed: free whatever of it still runs."""
        by_worker: dict[str, list[str]] = {}
        for sequence in sequences:
            if sequence.done:
                continue
            sequence.done = True
            self.queue.discard(sequence)
            worker = self.workers.get(sequence.worker_key)
            if worker is not None:
                worker.remove(sequence)
                worker.grant(now)
                by_worker.setdefault(worker.key, []).append(sequence.req_id)
        for key, req_ids in by_worker.items():
            self._port.send(key, Abort(req_ids))
        if by_worker:
            self._pump(now)

    # --- workers ----------------------------------------------------------------------------------------

    def on_view(self, view: ClusterView, now: float) -> None:
        """Follow the published membership: connect to new workers, give up those that left."""
        members = {m.info.incarnation: m for m in view.of_role("attention") if m.info.serving}
        for key, member in members.items():
            worker = self.workers.get(key)
            if worker is None:
                worker = Worker(key, member.rank, member.info.serving, connected_at=now)
                self.workers[key] = worker
                self._port.connect(key, worker.endpoint)
                self._send_lease(worker, now)
            elif worker.endpoint != member.info.serving:
                worker.endpoint = member.info.serving
                self._port.disconnect(key)
                self._port.connect(key, worker.endpoint)
            worker.follow(member)
        # Last, so that a newcomer can take over from its predecessor.
        for key in [key for key in self.workers if key not in members]:
            gone = self.workers.pop(key)
            self._port.disconnect(key)
            self.counters.workers_lost += not gone.lost
            self._abandon(gone, "it left the cluster", now)
        self._pump(now)

    def on_message(self, key: str, message: WorkerMessage, now: float) -> None:
        """A worker spoke."""
        worker = self.workers.get(key)
        if worker is None:
            return
        first_word = worker.heard_at is None or worker.lost
        worker.heard_at, worker.lost = now, False
        if isinstance(message, Tokens):
            for chunk in message.chunks:
                self._on_chunk(worker, chunk, now)
        elif isinstance(message, Refused):
            self._on_refused(worker, message, now)
        elif isinstance(message, WorkerStats):
            worker.stats, worker.ready = message, message.ready
            self._look(now)
        if self.queue and (first_word or not isinstance(message, Tokens)):
            self._pump(now)

    def tick(self, now: float) -> None:
        """Call about ten times a second: leases, silence, deadlines, questions about silent sequences."""
        paused_s = 0.0 if self._ticked_at is None else now - self._ticked_at
        self._ticked_at = now
        for worker in list(self.workers.values()):
            if worker.heard_at is not None and paused_s > PAUSE_S:
                worker.heard_at += paused_s  # this process stood still: nobody could be heard
            if now >= worker.lease_at:
                self._send_lease(worker, now)
            if worker.heard_at is not None and now - worker.heard_at > self.limits.silence_s:
                self.counters.workers_lost += not worker.lost
                worker.lost = True
                if worker.active and self._may_serve_beside(worker.key):  # else they wait: it may only be paused
                    self._port.send(worker.key, Abort(list(worker.active)))  # should it come back
                    self._abandon(worker, f"silent for {now - worker.heard_at:.1f} s", now)
            worker.renew(now, COOLING_MIN_S)
        lapsed = paused_s > self.limits.lease_s - LEASE_INTERVAL_S  # workers may have given up our sequences
        if lapsed or now - self._probed_at >= PROBE_INTERVAL_S:
            self._probed_at = now
            self._probe_silent(now, 0.0 if lapsed else PROBE_S)
        self._pump(now)

    # --- internals --------------------------------------------------------------------------------------

    def _on_chunk(self, worker: Worker, chunk: TokenChunk, now: float) -> None:
        sequence = worker.active.get(chunk.req_id)
        if sequence is None:
            self.counters.stale_chunks += 1
            return
        fault = sequence.fault(chunk, self.limits.vocab_size)
        if fault is not None:
            worker.remove(sequence)
            self._port.send(worker.key, Abort([sequence.req_id]))
            self._fail(sequence, WorkerError(f"attention worker {worker.rank} sent {fault}"))
            self._pump(now)
            return
        outcome = sequence.accept(chunk)
        if outcome is not Verdict.STALE:
            sequence.heard_at = now
        if isinstance(outcome, Delta):
            failed = outcome.finish in (FinishReason.ERROR, FinishReason.ABORT)
            if failed:
                outcome.finish = None
            if outcome.ids and len(sequence.output_ids) == len(outcome.ids):
                self._started(sequence, now)
            was_suspect, sequence.num_barren = sequence.num_barren > 0, 0
            sequence.sink.push(sequence, outcome, now)
            if failed:
                self._on_failed(worker, sequence, chunk, now)
            elif sequence.done:
                worker.remove(sequence)
                worker.grant(now)
                if chunk.finish is None:  # a stop string: the worker does not know yet
                    self._port.send(worker.key, Abort([sequence.req_id]))
                self._pump(now)
            elif was_suspect:
                self._pump(now)  # the next one
        elif outcome is Verdict.GAP:
            self.counters.gaps += 1
            if chunk.finish in (FinishReason.ERROR, FinishReason.ABORT):
                self._on_failed(worker, sequence, chunk, now)
            elif now - sequence.resend_at >= RESEND_INTERVAL_S:
                self._ask_again(worker, sequence, now)
        else:
            self.counters.stale_chunks += 1

    def _on_failed(self, worker: Worker, sequence: ClientSequence, chunk: TokenChunk, now: float) -> None:
        worker.remove(sequence)
        detail = chunk.error or "the worker gave no reason"
        why = f"attention worker {worker.rank} gave up the request: {detail}"
        if not chunk.retryable and chunk.finish is not FinishReason.ABORT:
            self._fail(sequence, WorkerError(f"attention worker {worker.rank}: {detail}"))
        elif not worker.serving and not self._may_serve_beside(worker.key):
            self._fail(sequence, PeerLostError(f"{why}; no other can take it over"))
        else:
            self._lose(sequence, why, now, worker.key)
            self._pump(now)

    def _on_refused(self, worker: Worker, message: Refused, now: float) -> None:
        sequence = worker.active.get(message.req_id)
        if sequence is None or sequence.attempt != message.attempt:
            return
        worker.remove(sequence)
        sequence.worker_key = ""
        self.counters.refused += 1
        if message.reason == "invalid":
            self._fail(sequence, RequestError(message.detail))
        elif message.reason == "unknown":  # the answer to a Resend: the Submit never arrived
            self._relocate(sequence, now)
        else:
            worker.cool(now + min(max(message.retry_after_s, COOLING_MIN_S), COOLING_MAX_S))
            elsewhere = any(other.has_room(now) for other in self.workers.values())
            fresh = self.limits.enforce and sequence.attempt == 0
            num_ahead = self.queue.num_ahead(sequence.priority, sequence.order)
            predicted_s = predicted_wait_s(self._serving_reports(), num_ahead, at_least_s=message.retry_after_s)
            wait_s = self._waits.apply(predicted_s)
            never = message.retry_after_s >= NEVER_S
            if never:
                wait_s = message.retry_after_s
            left_s = sequence.deadline - now
            # Who was let into the line stays there. The first may although the forecast says no: nothing else would
            # show that it is wrong.
            new = not sequence.lined_up_at or never
            if fresh and new and not elsewhere and wait_s > (left_s if num_ahead else SCOUT * left_s):
                self.counters.rejected_ttft += 1
                self._fail(sequence, self._too_late(wait_s, sequence.deadline - sequence.created_at))
            else:
                self._line_up(sequence, now, None if elsewhere else predicted_s)

    def _line_up(self, sequence: ClientSequence, now: float, predicted_s: float | None = None) -> None:
        """Put it into the queue. predicted_s: until it gets its place; None = it is offered to a worker first."""
        self.queue.push(sequence)
        if predicted_s is not None and sequence.lined_up_at == 0.0:
            sequence.lined_up_at, sequence.predicted_s = now, predicted_s

    def _started(self, sequence: ClientSequence, now: float) -> None:
        """Its first token is here: learn from what it took."""
        if sequence.lined_up_at:
            self._waits.took(sequence.placed_at - sequence.lined_up_at, sequence.predicted_s)
        if sequence.predicted_prefill_s:
            self._prefills.took(now - sequence.placed_at, sequence.predicted_prefill_s)

    def _pump(self, now: float) -> None:
        """Place whatever is queued and fits somewhere; end what has waited too long."""
        for sequence in self.queue.take_expired(now):
            self._expire(sequence, now)
        self._look(now)
        if not self.queue:
            for worker in self.workers.values():
                worker.uncool()
            return
        if self._outage.is_hopeless(now):
            for sequence in self.queue.take_all():
                self._fail(sequence, self._nobody(sequence))
            return
        for sequence in self.queue.in_order():
            rooms = [worker for worker in self.workers.values() if worker.has_room(now)]
            if not rooms:
                return
            if self._may_serve_beside(sequence.avoid_key):
                rooms = [room for room in rooms if room.key != sequence.avoid_key]
            if sequence.num_barren:
                rooms = [room for room in rooms if not room.has_suspect]
            choice = choose_worker(rooms, now)
            if choice is not None:
                self._place(sequence, choice, now)

    def _place(self, sequence: ClientSequence, worker: Worker, now: float) -> None:
        self.queue.discard(sequence)
        worker.add(sequence)
        sequence.worker_key = worker.key
        sequence.placed_at = sequence.heard_at = now
        sequence.num_placed = len(sequence.output_ids)
        sequence.predicted_prefill_s = prefill_s(_reports([worker]), len(sequence.prompt_ids))
        self.counters.placed += 1
        log.debug("%s goes to attention/%d, attempt %d", sequence.req_id, worker.rank, sequence.attempt)
        fresh = self.limits.enforce and sequence.attempt == 0
        self._port.send(worker.key, sequence.submit_message(max(0.001, sequence.first_due_at - now) if fresh else 0.0))

    def _abandon(self, worker: Worker, why: str, now: float) -> None:
        """A worker is lost: its sequences go elsewhere, or end."""
        for sequence in list(worker.active.values()):
            worker.remove(sequence)
            # A worker that reaches no FFN worker computes nothing: its end says nothing of what it holds.
            sequence.num_barren += worker.ready and not sequence.has_gained
            lost = f"attention worker {worker.rank} was lost ({why})"
            if sequence.num_barren >= MAX_BARREN:
                guess = f"so were {MAX_BARREN - 1} before it, each before it had computed a token of this request"
                self._fail(sequence, PeerLostError(f"{lost}; {guess}: it is not tried again"))
            else:
                self._lose(sequence, lost, now, worker.key)

    def _lose(self, sequence: ClientSequence, why: str, now: float, avoid_key: str) -> None:
        """The worker that ran a sequence is gone or has failed it."""
        sequence.num_losses += 1
        sequence.why_lost = why
        if sequence.num_losses >= MAX_LOSSES:
            self._fail(sequence, PeerLostError(f"{why}; given up after {MAX_LOSSES} attempts"))
            return
        sequence.avoid_key = avoid_key
        self._relocate(sequence, now)

    def _relocate(self, sequence: ClientSequence, now: float) -> None:
        """Run the rest of a sequence somewhere: same seed, prompt and output so far, next attempt."""
        sequence.worker_key = ""
        num_done = len(sequence.output_ids)
        if num_done >= sequence.sampling.max_tokens:  # only the word that it is finished was lost
            last = TokenChunk(sequence.req_id, sequence.attempt, num_done, [], finish=FinishReason.LENGTH)
            delta = sequence.accept(last)
            assert isinstance(delta, Delta)
            sequence.sink.push(sequence, delta, now)
            return
        sequence.attempt += 1
        sequence.deadline = now + self.limits.recovery_timeout_s
        self.counters.migrated += 1
        self._line_up(sequence, now)

    def _may_serve_beside(self, key: str) -> bool:
        """Another worker than that one can be waited for."""
        return any(worker.may_serve for worker in self.workers.values() if worker.key != key)

    def _probe_silent(self, now: float, patience_s: float) -> None:
        for worker in self.workers.values():
            for sequence in worker.active.values():
                if now - sequence.heard_at >= patience_s:
                    sequence.heard_at = now
                    self._ask_again(worker, sequence, now)

    def _ask_again(self, worker: Worker, sequence: ClientSequence, now: float) -> None:
        sequence.resend_at = now
        self._port.send(worker.key, Resend(sequence.req_id, sequence.attempt, len(sequence.output_ids)))

    def _send_lease(self, worker: Worker, now: float) -> None:
        live = list(worker.active) if worker.num_leases % LIVE_IDS_EVERY == 0 else None
        worker.num_leases += 1
        worker.lease_at = now + LEASE_INTERVAL_S
        self._port.send(worker.key, Lease(self._gateway_id, self.limits.lease_s, live))

    def _expire(self, sequence: ClientSequence, now: float) -> None:
        if sequence.attempt > 0:
            why = sequence.why_lost or "its worker forgot the request"
            self._fail(sequence, PeerLostError(f"{why}, and no worker could take it over in time"))
        else:
            self.counters.rejected_ttft += 1
            if sequence.lined_up_at:
                self._waits.took_longer(now - sequence.lined_up_at, sequence.predicted_s)
            self._fail(sequence, self._too_late(self._wait_of_newcomer_s(), now - sequence.created_at))

    def _wait_of_newcomer_s(self) -> float:
        """Predicted wait of one who comes now, behind the whole line; a second at least."""
        return max(1.0, self._waits.apply(predicted_wait_s(self._serving_reports(), len(self.queue))))

    def _serving_reports(self) -> list[WorkerStats]:
        return _reports(worker for worker in self.workers.values() if worker.serving)

    def _nobody(self, sequence: ClientSequence) -> AfdError:
        if sequence.attempt > 0:
            return PeerLostError("the request's worker was lost and no other can take over")
        return UnavailableError("no attention worker is serving", code="not_ready")

    @staticmethod
    def _too_late(wait_s: float, target_s: float) -> UnavailableError:
        return UnavailableError(
            f"no worker has room within {target_s:.1f} s (time to first token); retry later",
            retry_after_s=wait_s,
            code="overloaded",
        )

    @staticmethod
    def _fail(sequence: ClientSequence, error: AfdError) -> None:
        sequence.done = True
        sequence.sink.fail(error)


def _reports(workers: Iterable[Worker]) -> list[WorkerStats]:
    return [worker.stats for worker in workers if worker.stats is not None]
