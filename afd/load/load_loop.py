"""Sending: a closed loop of users or an open loop of arrivals, one record a request."""

from __future__ import annotations

import asyncio
import time

from afd.errors import ConfigError
from afd.load.client import CompletionSettings, complete
from afd.load.http1 import HttpClient
from afd.load.progress import Progress, Status
from afd.load.record import Outcome, RequestRecord
from afd.load.workload import Prompt

MAX_BODIES_BYTES = 1 << 30
# A user of a closed loop who is refused comes again after Retry-After, as a client should; not later than this.
MAX_RETRY_AFTER_S = 5.0


def encode_bodies(completion: CompletionSettings, prompts: list[Prompt]) -> list[bytes]:
    """JSON bodies of all prompts; ConfigError when they would fill the memory."""
    bodies = []
    num_bytes = 0
    for prompt in prompts:
        bodies.append(completion.encode(prompt))
        num_bytes += len(bodies[-1])
        if num_bytes > MAX_BODIES_BYTES:
            raise ConfigError(
                f"{len(prompts)} prompts of this length are more than {MAX_BODIES_BYTES >> 20} MiB of requests: "
                "lower --num-prompts or --input-len"
            )
    return bodies


class LoadLoop:
    """The measured requests of one run. Owns their records, in the order sent. Event-loop thread only.

    Cancelling a loop ends the requests that run as INTERRUPTED.
    """

    def __init__(self, client: HttpClient, completion: CompletionSettings, prompts: list[Prompt], progress: Progress):
        self.records: list[RequestRecord] = []
        self.started_s = 0.0
        self._client = client
        self._completion = completion
        self._num_prompt_tokens = [prompt.num_tokens for prompt in prompts]
        self._bodies = encode_bodies(completion, prompts)
        self._progress = progress
        self._running: dict[int, RequestRecord] = {}
        self._num_done = 0
        self._num_failed = 0
        self._num_done_chunks = 0

    async def closed(self, num_users: int) -> None:
        """`num_users` users, each sending its next request when its last has ended."""
        todo = iter(range(len(self._bodies)))

        async def user() -> None:
            for request_idx in todo:
                record = await self._send(request_idx, due_s=time.perf_counter())
                if record.outcome is Outcome.REFUSED and record.retry_after_s:
                    await asyncio.sleep(min(record.retry_after_s, MAX_RETRY_AFTER_S))

        self.started_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(num_users):
                group.create_task(user())

    async def open(self, times_s: list[float], max_running: int) -> None:
        """Request i is sent `times_s[i]` after the start, whatever the server does; later only if `max_running` run."""
        places = asyncio.Semaphore(max_running)

        async def send(request_idx: int, due_s: float) -> None:
            try:
                await self._send(request_idx, due_s)
            finally:
                places.release()

        self.started_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for request_idx, time_s in enumerate(times_s):
                due_s = self.started_s + time_s
                await _sleep_until(due_s)
                await places.acquire()
                group.create_task(send(request_idx, due_s))

    async def draw(self) -> None:
        """Draw the progress until cancelled."""
        while True:
            await asyncio.sleep(self._progress.interval_s)
            self.show()

    def show(self, *, last: bool = False) -> None:
        """Draw the progress now."""
        num_chunks = self._num_done_chunks + sum(len(record.token_times) for record in self._running.values())
        status = Status(
            num_total=len(self._bodies),
            num_done=self._num_done,
            num_failed=self._num_failed,
            num_running=len(self._running),
            num_tokens=num_chunks,
            elapsed_s=time.perf_counter() - self.started_s,
        )
        self._progress.show(status, last=last)

    async def _send(self, request_idx: int, due_s: float) -> RequestRecord:
        texts: list[str] | None = [] if self._completion.keep_texts else None
        record = RequestRecord(request_idx, self._num_prompt_tokens[request_idx], due_s=due_s, texts=texts)
        self.records.append(record)
        self._running[request_idx] = record
        try:
            await complete(self._client, self._completion, self._bodies[request_idx], record)
        finally:
            del self._running[request_idx]
            self._num_done += 1
            self._num_failed += record.failed
            self._num_done_chunks += len(record.token_times)
        return record


async def _sleep_until(due_s: float) -> None:
    """Timers have milliseconds and may fire early; this one does not."""
    await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
    while (wait_s := due_s - time.perf_counter()) > 0:
        await asyncio.sleep(wait_s)
