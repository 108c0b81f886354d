"""A `WorkerCore` with a scripted engine, as the world of a scenario."""

from __future__ import annotations

from afd.messages.serving import Abort, Lease, Refused, Resend, Submit, Tokens, WorkerMessage
from afd.sched.sequence import MicroBatch
from afd.types import SamplingParams
from tests.fakes.worker_core import ScriptedWorker, attention, view


class WorkerWorld:
    """One attention worker. A gateway is called by its name, `gw` where none is given.

    `a[0..4]` are positions in the text of request a, output included. `a/1` is its attempt 1, `tokens [2]` an output
    index.
    """

    def __init__(self) -> None:
        self._said: list[str] = []
        self._worker = ScriptedWorker.make(num_blocks=64)

    # -- commands -----------------------------------------------------------------------------------------

    def worker(self, streams: str = "1", blocks: str = "64", policy: str = "off") -> None:
        """The worker, instead of one with a stream and 64 blocks of 4 tokens."""
        self._worker = ScriptedWorker.make(num_streams=int(streams), num_blocks=int(blocks), policy=policy)

    def at(self, seconds: str) -> None:
        """The clock shows so much."""
        while self._worker.now < float(seconds):  # turn after turn: a jump would be a pause of the worker's own
            self._worker.now = min(float(seconds), self._worker.now + 0.25)
            self._worker.core.tick(self._worker.now)

    def report(self) -> None:
        """A turn of the loop in which the load is told."""
        self._worker.core.report(self._worker.now)

    def lease(self, gateway: str = "gw", ttl: str = "60", live: str | None = None) -> None:
        names = None if live is None else live.split(",")
        self._worker.tell(Lease(gateway, float(ttl), names), gateway=gateway.encode())

    def submit(
        self, name: str, prompt: str = "3", output: str = "3", attempt: str = "0", had: str = "0", gateway: str = "gw"
    ) -> None:
        """A request of so many prompt tokens for so many of output, `had` of which came from another worker."""
        sampling = SamplingParams(max_tokens=int(output), seed=1)
        message = Submit(name, int(attempt), [1] * int(prompt), [2] * int(had), sampling)
        self._worker.tell(message, gateway=gateway.encode())

    def abort(self, *names: str, gateway: str = "gw") -> None:
        self._worker.tell(Abort(list(names)), gateway=gateway.encode())

    def resend(self, name: str, attempt: str = "0", start: str = "0", gateway: str = "gw") -> None:
        """The gateway asks for a request's tokens from output index `start` on."""
        self._worker.tell(Resend(name, int(attempt), int(start)), gateway=gateway.encode())

    def ready(self) -> None:
        """Every FFN worker can be reached."""
        self._worker.core.set_ready(True, "", self._worker.now)

    def not_ready(self, why: str) -> None:
        self._worker.core.set_ready(False, why, self._worker.now)

    def members(self, *ranks: str) -> None:
        """A new view with these attention workers: RANK, RANK:loading or RANK:draining."""
        found = []
        for text in ranks:
            rank, _, state = text.partition(":")
            found.append(attention(int(rank), ready=state != "loading", draining=state == "draining"))
        self._worker.core.adopt(view(*found))

    def drain(self) -> None:
        self._worker.core.drain()

    def begin(self) -> None:
        """A step begins in every empty stream that has work."""
        before = dict(self._worker.in_flight)
        self._worker.begin()
        for stream, batch in self._worker.in_flight.items():
            if before.get(stream) is not batch:
                self._said.append(f"stream {stream} computes {_described(batch)}")

    def commit(self, *streams: str) -> None:
        """The steps of these streams, or of all, are over, and their tokens leave."""
        for stream in streams or list(self._worker.in_flight):
            self._worker.commit(int(stream))
        self._worker.core.publish()

    def lost(self, reason: str) -> None:
        """An FFN worker is gone, and with it every step in flight."""
        self._worker.fail(reason)

    def serve(self) -> None:
        """Steps until nothing is left."""
        while not self._worker.core.scheduler.idle:
            self._worker.step()

    # -- what comes of it ---------------------------------------------------------------------------------

    def news(self) -> list[str]:
        self._worker.core.scheduler.check()
        lines, self._said = self._said, []
        for to, message in self._worker.core.take_outbox():
            lines += _lines(to.decode(), message)
        return lines


def _described(batch: MicroBatch) -> str:
    return ", ".join(f"{item.seq.req_id}{_span(item.start, item.num_new)}" for item in batch.items)


def _span(first: int, count: int) -> str:
    return f"[{first}]" if count == 1 else f"[{first}..{first + count - 1}]"


def _lines(to: str, message: WorkerMessage) -> list[str]:
    if isinstance(message, Tokens):
        lines = []
        for chunk in message.chunks:
            tokens = f"tokens {_span(chunk.first_idx, len(chunk.ids))}" if chunk.ids else "no tokens"
            end = "" if chunk.finish is None else f", {chunk.finish.value}"
            why = "" if chunk.error is None else f": {chunk.error}"
            lines.append(f"{to} <- {chunk.req_id}/{chunk.attempt} {tokens}{end}{why}{', retryable' * chunk.retryable}")
        return lines
    if isinstance(message, Refused):
        return [f"{to} <- {message.req_id}/{message.attempt} refused, {message.reason}: {message.detail}"]
    draining = ", draining" if message.draining else ""
    return [
        f"{to} <- {message.num_running} run, {message.num_waiting} wait, {message.kv_blocks_free} blocks free{draining}"
    ]
