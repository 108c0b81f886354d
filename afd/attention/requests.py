"""What a gateway's message does to the worker's requests: checks, queueing, aborts, and the answers."""

from __future__ import annotations

from afd.attention.frontend import Frontend
from afd.messages.serving import Abort, GatewayMessage, Lease, Refused, Resend, Submit, TokenChunk
from afd.sched.policy import Admission
from afd.sched.scheduler import Scheduler
from afd.sched.sequence import Output
from afd.sched.submission import admit
from afd.types import FinishReason

MAX_TPOT_S = 1e4
MAX_ID_CHARS = 256


class RequestBook:
    """Between the frontend (sockets) and the scheduler (decisions). Main thread only.

    accepting: why no new request is taken now ("" = they are).
    """

    def __init__(
        self, frontend: Frontend, scheduler: Scheduler, admission: Admission, *, vocab_size: int, max_waiting: int
    ):
        self._frontend = frontend
        self._scheduler = scheduler
        self._admission = admission
        self._vocab_size = vocab_size
        self._max_waiting = max_waiting
        self._arrivals = 0
        self.not_accepting = "not ready"
        self.draining = False

    def handle(self, gateway: bytes, message: GatewayMessage, now: float) -> None:
        """One message of a gateway."""
        if isinstance(message, Submit):
            self._submit(gateway, message, now)
        elif isinstance(message, Abort):
            for req_id in message.req_ids:
                self._drop(req_id)
        elif isinstance(message, Resend):
            if not self._frontend.resend(message.req_id, message.attempt, message.from_idx):
                detail = "the worker does not know this attempt: its submission was lost, or it ended long ago"
                self._frontend.refuse(gateway, Refused(message.req_id, message.attempt, "unknown", detail))
        elif isinstance(message, Lease) and message.live_req_ids is not None:
            alive = set(message.live_req_ids)
            for seq in self._scheduler.sequences():
                if seq.owner == gateway and seq.req_id not in alive:
                    self._drop(seq.req_id)

    def end_gateway(self, gateway: bytes) -> int:
        """The gateway's lease ended: abort its requests -> how many."""
        orphans = [seq.req_id for seq in self._scheduler.sequences() if seq.owner == gateway]
        for req_id in orphans:
            self._drop(req_id)
        return len(orphans)

    def fail_all(self, error: str, *, retryable: bool) -> int:
        """End every request with an error (nothing is in flight) -> how many."""
        seqs = self._scheduler.sequences()
        for seq in seqs:
            self._scheduler.abort(seq.req_id, FinishReason.ERROR)
            self._frontend.post(
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
        self._frontend.flush()
        return len(seqs)

    def publish(self, outputs: list[Output]) -> None:
        """Send the tokens of a commit."""
        for output in outputs:
            progress = output.progress
            seq = progress.seq
            if progress.finish in (FinishReason.STOP, FinishReason.LENGTH):
                self._admission.finished(seq)
            self._frontend.post(
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
        self._frontend.flush()

    # -- details ------------------------------------------------------------------------------------------

    def _submit(self, gateway: bytes, message: Submit, now: float) -> None:
        known = self._scheduler.get(message.req_id)
        if known is not None:
            if known.attempt >= message.attempt:
                return  # a duplicate
            self._drop(message.req_id)
        reason, detail = self._fault(message)
        if reason:
            self._frontend.refuse(gateway, Refused(message.req_id, message.attempt, reason, detail))
            return
        self._arrivals += 1
        answer = admit(message, self._admission, owner=gateway, arrival=self._arrivals, now=now)
        if isinstance(answer, Refused):
            self._frontend.refuse(gateway, answer)
            return
        self._frontend.open(message.req_id, gateway, message.attempt, len(message.output_ids))
        self._scheduler.add(answer)

    def _fault(self, message: Submit) -> tuple[str, str]:
        """Why the request cannot be taken, whatever admission says, which counts only what could run: (reason, detail),
        or ("", "").
        """
        if self.draining:
            return "draining", "the worker is shutting down"
        if self.not_accepting:
            return "not_ready", self.not_accepting
        if self._scheduler.num_waiting >= self._max_waiting:
            return "capacity", f"{self._max_waiting} requests wait already"
        ids = [*message.prompt_ids, *message.output_ids]
        if not message.prompt_ids:
            return "invalid", "the prompt is empty"
        if min(ids) < 0 or max(ids) >= self._vocab_size:
            return "invalid", f"a token id is outside 0..{self._vocab_size - 1}"
        if message.sampling.max_tokens <= len(message.output_ids):
            return "invalid", "max_tokens must leave at least one token to generate"
        fault = message.sampling.fault(self._vocab_size)
        if fault is not None:
            return "invalid", fault
        if not 0.0 <= message.tpot_s <= MAX_TPOT_S:
            return "invalid", f"a TPOT target of {message.tpot_s} s is not in 0..{MAX_TPOT_S:.0f}"
        if len(message.req_id) > MAX_ID_CHARS:
            return "invalid", f"a request id of {len(message.req_id)} characters is longer than {MAX_ID_CHARS}"
        never = self._scheduler.refusal(len(message.prompt_ids), message.sampling.max_tokens)
        return ("invalid", never) if never else ("", "")

    def _drop(self, req_id: str) -> None:
        self._scheduler.abort(req_id)
        self._frontend.close_request(req_id)
