"""A scripted attention worker: a ROUTER that speaks afd.messages.serving, without a model.

Everything it does is decided by its fields, so that a test can make it slow, full, silent, forgetful or wrong. It runs
in the test's event loop.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import zmq
import zmq.asyncio

from afd.messages.codec import encode
from afd.messages.membership import Member, WorkerInfo
from afd.messages.serving import (
    Abort,
    GatewayMessage,
    Lease,
    Refused,
    Resend,
    Submit,
    TokenChunk,
    TokenLogprobs,
    Tokens,
    WorkerMessage,
    WorkerStats,
    gateway_message_decoder,
    lease_identity,
)
from afd.messages.serving_sockets import server_socket
from afd.types import FinishReason

STATS_INTERVAL_S = 0.2


def counting_tokens(prompt_ids: Sequence[int], output_idx: int) -> int:
    """Default script: depends on prompt and position only, so a migrated request goes on where it was."""
    return 33 + (sum(prompt_ids) + 7 * output_idx) % 90


@dataclass
class _Run:
    """One request at the worker."""

    sender: bytes
    submit: Submit
    task: asyncio.Task[None] | None = None
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish: FinishReason | None = None


class FakeWorker:
    """A worker that answers by a script, over a real socket. Fields may be changed at any time.

    script: (prompt ids, output index) -> token id.
    delay_s: between steps.
    tokens_per_chunk: of one message.
    refuse: gives a refusal for a Submit, or None to take it.
    drop: chunks for which it is true are lost on the way.
    fail_at: output index at which the request fails with (error text, retryable).
    mute: nothing is sent at all.
    forget_submits: Submits are lost on the way.

    `hold`, `allow` and `run_freely` let the test decide when each chunk is sent.
    """

    def __init__(self, secret: bytes, rank: int = 0):
        self.rank = rank
        self.incarnation = uuid.uuid4().hex
        self.script: Callable[[Sequence[int], int], int] = counting_tokens
        self.delay_s = 0.0
        self.tokens_per_chunk = 1
        self._gate: asyncio.Semaphore | None = None
        self.refuse: Callable[[Submit], Refused | None] = lambda submit: None
        self.drop: Callable[[TokenChunk], bool] = lambda chunk: False
        self.fail_at: tuple[int, str, bool] | None = None
        self.mute = False
        self.forget_submits = False
        self.cached_tokens = 0
        self.places_s: list[float] = []
        self.max_tokens = 0
        self.draining = False
        self.received: list[GatewayMessage] = []
        self.aborted: set[str] = set()
        self._runs: dict[str, _Run] = {}
        self._gateways: set[bytes] = set()
        self._changed = asyncio.Condition()
        self._ctx = zmq.asyncio.Context()
        self._socket = server_socket(self._ctx, secret, 8 << 20)
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.endpoint = f"tcp://127.0.0.1:{port}"
        self._tasks = [
            asyncio.get_running_loop().create_task(self._receive()),
            asyncio.get_running_loop().create_task(self._report()),
        ]

    def member(self, *, ready: bool = True, draining: bool = False) -> Member:
        """The member as the coordinator would publish it."""
        info = WorkerInfo(
            role="attention",
            incarnation=self.incarnation,
            host="127.0.0.1",
            pid=1,
            config_hash="fake",
            serving=self.endpoint,
        )
        return Member(info=info, rank=self.rank, ready=ready, draining=draining)

    @property
    def num_running(self) -> int:
        return sum(1 for run in self._runs.values() if run.finish is None)

    def submits(self) -> list[Submit]:
        return [message for message in self.received if isinstance(message, Submit)]

    def hold(self) -> None:
        """Send each chunk only with a permit from now on."""
        self._gate = asyncio.Semaphore(0)

    def allow(self, num_chunks: int = 1) -> None:
        for _ in range(num_chunks):
            assert self._gate is not None, "hold first"
            self._gate.release()

    def run_freely(self) -> None:
        self.allow(10_000)  # more than any test sends

    async def wait_submits(self, count: int = 1) -> None:
        await self.wait_until(lambda: len(self.submits()) >= count)

    async def wait_until(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Wait until a condition over this worker's fields holds; it is looked at after every message."""
        async with asyncio.timeout(timeout_s), self._changed:
            await self._changed.wait_for(condition)

    async def close(self) -> None:
        """Die: connections close, nothing is said."""
        tasks = self._tasks + [run.task for run in self._runs.values() if run.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._socket.close(linger=0)
        self._ctx.term()

    # --- internals --------------------------------------------------------------------------------------

    async def _receive(self) -> None:
        while True:
            sender, frame = await self._socket.recv_multipart()
            message = gateway_message_decoder.decode(frame)
            await self._handle(sender, message)
            async with self._changed:
                self._changed.notify_all()

    async def _handle(self, sender: bytes, message: GatewayMessage) -> None:
        if isinstance(message, Lease) and sender == lease_identity(message.gateway):
            return
        if sender not in self._gateways:
            self._gateways.add(sender)
            await self._send(sender, self._stats())
        if isinstance(message, Submit) and self.forget_submits:
            return
        self.received.append(message)
        if isinstance(message, Submit):
            await self._on_submit(sender, message)
        elif isinstance(message, Abort):
            for req_id in message.req_ids:
                self._abort(req_id)
        elif isinstance(message, Resend):
            await self._on_resend(sender, message)
        elif isinstance(message, Lease) and message.live_req_ids is not None:
            live = set(message.live_req_ids)
            for req_id in [r for r, run in self._runs.items() if run.finish is None and r not in live]:
                self._abort(req_id)

    async def _on_submit(self, sender: bytes, submit: Submit) -> None:
        refusal = self.refuse(submit)
        if refusal is not None:
            await self._send(sender, refusal)
            return
        run = _Run(sender, submit, ids=list(submit.output_ids))
        run.logprobs = [TokenLogprobs(-1.0, []) for _ in run.ids] if submit.sampling.logprobs >= 0 else None
        self._runs[submit.req_id] = run
        run.task = asyncio.get_running_loop().create_task(self._generate(run))

    async def _on_resend(self, sender: bytes, resend: Resend) -> None:
        run = self._runs.get(resend.req_id)
        if run is None or run.submit.attempt != resend.attempt:
            await self._send(sender, Refused(resend.req_id, resend.attempt, "unknown", "never seen here"))
        elif len(run.ids) > resend.from_idx or run.finish is not None:
            await self._send_tokens(run, resend.from_idx)

    def _abort(self, req_id: str) -> None:
        run = self._runs.pop(req_id, None)
        if run is not None and run.task is not None:
            run.task.cancel()
        self.aborted.add(req_id)

    async def _generate(self, run: _Run) -> None:
        submit, sampling = run.submit, run.submit.sampling
        while run.finish is None:
            first_idx = len(run.ids)
            if self._gate is not None:
                await self._gate.acquire()
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            for _ in range(self.tokens_per_chunk):
                if self.fail_at is not None and len(run.ids) >= self.fail_at[0]:
                    run.finish = FinishReason.ERROR
                    break
                token_id = self.script(submit.prompt_ids, len(run.ids))
                run.ids.append(token_id)
                if run.logprobs is not None:
                    run.logprobs.append(TokenLogprobs(-0.5, [(token_id, -0.5), (token_id + 1, -1.5)]))
                if token_id in sampling.stop_token_ids and len(run.ids) > sampling.min_tokens:
                    run.finish = FinishReason.STOP
                elif len(run.ids) >= sampling.max_tokens:
                    run.finish = FinishReason.LENGTH
                if run.finish is not None:
                    break
            await self._send_tokens(run, first_idx)

    async def _send_tokens(self, run: _Run, first_idx: int) -> None:
        failed = run.finish is FinishReason.ERROR and self.fail_at is not None
        chunk = TokenChunk(
            req_id=run.submit.req_id,
            attempt=run.submit.attempt,
            first_idx=first_idx,
            ids=run.ids[first_idx:],
            logprobs=run.logprobs[first_idx:] if run.logprobs is not None else None,
            finish=run.finish,
            error=self.fail_at[1] if failed and self.fail_at else None,
            retryable=self.fail_at[2] if failed and self.fail_at else False,
            cached_tokens=self.cached_tokens,
        )
        if not self.drop(chunk):
            await self._send(run.sender, Tokens([chunk]))

    def _stats(self) -> WorkerStats:
        return WorkerStats(
            rank=self.rank,
            num_running=self.num_running,
            num_waiting=0,
            kv_blocks_total=100,
            kv_blocks_free=100 - self.num_running,
            draining=self.draining,
            places_s=self.places_s,
            max_tokens=self.max_tokens,
        )

    async def send_stats(self) -> None:
        for gateway in self._gateways:
            await self._send(gateway, self._stats())

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(STATS_INTERVAL_S)
            await self.send_stats()

    async def _send(self, gateway: bytes, message: WorkerMessage) -> None:
        if not self.mute:
            await self._socket.send_multipart([gateway, encode(message)])
