"""One benchmark run: ask the server, build the workload, warm up, send, collect what came back.

Everything that costs time (prompts, JSON bodies, arrival times) is done before the clock starts; the garbage collector
is kept away from what was built.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from afd.errors import AfdError, ConfigError
from afd.host.open_files import OWN_FILES, raise_open_files, too_few_files
from afd.load.client import CompletionSettings, Endpoint, complete
from afd.load.http1 import HttpClient, ServerUrl
from afd.load.load_loop import LoadLoop, encode_bodies
from afd.load.progress import Progress
from afd.load.record import Outcome, RequestRecord
from afd.load.server_info import ServerInfo, ask_server
from afd.load.workload import (
    ASSUMED_VOCAB_SIZE,
    LengthRange,
    Prompt,
    arrival_times,
    load_prompts,
    random_chat_prompts,
    random_token_prompts,
    repeat_prompts,
)

DEFAULT_NUM_PROMPTS = 100
MAX_RUNNING = 4096  # of an open loop without a limit of its own: bounds sockets and memory

T = TypeVar("T")


class StoppedError(AfdError):
    """The run was stopped before it measured anything."""


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """A run, fully resolved but for what only the server knows.

    rate: None = closed loop of `concurrency` users; else requests/s of an open loop.
    concurrency: None (open loop only) = up to MAX_RUNNING requests at a time.
    dataset: None = random prompts.
    num_prompts: None = DEFAULT_NUM_PROMPTS random ones, or the dataset once.
    model, vocab_size: None = ask the server.
    """

    url: ServerUrl
    model: str | None = None
    endpoint: Endpoint = "completions"
    concurrency: int | None = 1
    rate: float | None = None
    burstiness: float = 1.0
    num_prompts: int | None = None
    num_warmups: int = 1
    input_len: int = 128
    output_len: int = 128
    range_ratio: float = 0.0
    dataset: Path | None = None
    vocab_size: int | None = None
    seed: int = 0
    ignore_eos: bool = True
    temperature: float = 0.0
    timeout_s: float = 600.0
    api_key: str = ""
    keep_texts: bool = False


@dataclass(frozen=True, slots=True)
class BenchRun:
    """What a run left.

    records: in the order sent.
    client_cpu_s: of this whole process, while requests ran.
    """

    server: ServerInfo
    records: list[RequestRecord]
    started_s: float
    duration_s: float
    client_cpu_s: float
    interrupted: bool


async def run_bench(settings: BenchSettings, progress: Progress, stop: asyncio.Event) -> BenchRun:
    """Run to the end, or until `stop` is set: what was measured so far is returned either way.

    StoppedError when `stop` came before the first measured request. ConfigError when the run cannot start: no server,
    no model, a dataset that does not fit, a warm-up that fails.
    """
    client = HttpClient(settings.url, api_key=settings.api_key)
    try:
        server = await _unless(stop, ask_server(client, settings.model))
        completion = CompletionSettings(
            model=server.model,
            endpoint=settings.endpoint,
            temperature=settings.temperature,
            ignore_eos=settings.ignore_eos,
            timeout_s=settings.timeout_s,
            keep_texts=settings.keep_texts,
        )
        vocab_size = settings.vocab_size or server.vocab_size
        if vocab_size is None and settings.dataset is None and settings.endpoint == "completions":
            progress.note(f"the server does not say its vocabulary size: {ASSUMED_VOCAB_SIZE} assumed (--vocab-size)")
        warmups, prompts = build_prompts(settings, vocab_size or ASSUMED_VOCAB_SIZE)
        num_running = min(settings.concurrency or MAX_RUNNING, len(prompts))
        _allow_descriptors(num_running)
        loop = LoadLoop(client, completion, prompts, progress)
        times_s = (
            arrival_times(len(prompts), settings.rate, settings.burstiness, settings.seed) if settings.rate else None
        )
        await _unless(stop, _warm_up(client, completion, warmups, num_running, progress))
        work = loop.closed(num_running) if times_s is None else loop.open(times_s, num_running)
        with _frozen_heap():
            cpu_s = time.process_time()
            interrupted = await _measure(stop, work, loop)
            duration_s = time.perf_counter() - loop.started_s
            cpu_s = time.process_time() - cpu_s
        loop.show(last=True)
        return BenchRun(server, loop.records, loop.started_s, duration_s, cpu_s, interrupted)
    finally:
        await client.close()


def build_prompts(settings: BenchSettings, vocab_size: int) -> tuple[list[Prompt], list[Prompt]]:
    """(warm-up prompts, measured prompts). ConfigError when the dataset is wrong."""
    chat = settings.endpoint == "chat"
    if settings.dataset is not None:
        dataset = load_prompts(settings.dataset, settings.output_len, chat=chat)
        num_prompts = settings.num_prompts or len(dataset)
        return repeat_prompts(dataset, settings.num_warmups), repeat_prompts(dataset, num_prompts)
    input_len = LengthRange(settings.input_len, settings.range_ratio)
    output_len = LengthRange(settings.output_len, settings.range_ratio)

    def draw(num_prompts: int, purpose: str) -> list[Prompt]:
        if chat:
            return random_chat_prompts(num_prompts, input_len, output_len, seed=settings.seed, purpose=purpose)
        return random_token_prompts(
            num_prompts, input_len, output_len, vocab_size=vocab_size, seed=settings.seed, purpose=purpose
        )

    return draw(settings.num_warmups, "warm-up"), draw(settings.num_prompts or DEFAULT_NUM_PROMPTS, "measured")


async def _measure(stop: asyncio.Event, work: Coroutine[Any, Any, None], loop: LoadLoop) -> bool:
    """Run the load with its progress; True when `stop` cut it off."""
    drawing = asyncio.create_task(loop.draw())
    try:
        await _unless(stop, work)
    except StoppedError:
        if not loop.records:
            raise
        return True
    finally:
        drawing.cancel()
        await asyncio.wait([drawing])
    return False


async def _warm_up(
    client: HttpClient, completion: CompletionSettings, prompts: list[Prompt], num_users: int, progress: Progress
) -> None:
    """Send the warm-up prompts as a closed loop. ConfigError when one fails otherwise than by a refusal."""
    if not prompts:
        return
    progress.note(f"warming up with {len(prompts)} request{'s' if len(prompts) > 1 else ''}")
    bodies = iter(encode_bodies(completion, prompts))
    failures: list[RequestRecord] = []

    async def user() -> None:
        for body in bodies:
            record = RequestRecord(0, 0)
            await complete(client, completion, body, record)
            if record.failed and record.outcome is not Outcome.REFUSED:
                failures.append(record)
            if failures:
                return

    async with asyncio.TaskGroup() as group:
        for _ in range(min(num_users, len(prompts))):
            group.create_task(user())
    if failures:
        raise ConfigError(f"a warm-up request failed ({failures[0].outcome.value}): {failures[0].error}")


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, or StoppedError when `stop` comes first; `work` is then cancelled and waited for."""
    task = asyncio.create_task(work)
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        task.cancel()
        stopped.cancel()
        await asyncio.wait({task, stopped})
    if task.cancelled():
        raise StoppedError("stopped before anything was measured")
    return task.result()


def _allow_descriptors(num_connections: int) -> None:
    """Raise the limit on open files; ConfigError when it stays too low for so many connections."""
    limit, needed = raise_open_files(), num_connections + OWN_FILES
    if limit < needed:
        raise ConfigError(too_few_files(limit, needed, f"a benchmark with {num_connections} connections"))


@contextmanager
def _frozen_heap() -> Iterator[None]:
    """Prompts and bodies are out of the garbage collector's sight while times are taken."""
    is_ours = gc.get_freeze_count() == 0  # what the process froze before stays frozen
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if is_ours:
            gc.unfreeze()
