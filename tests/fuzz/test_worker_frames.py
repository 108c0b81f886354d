"""Mutated ZeroMQ frames into an attention worker: dropped, refused, or served to the end; the main loop never raises.

Socket, core, admission, scheduler and sampler are the real ones; logits are random.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import zmq

from afd.attention.gateway_link import GatewayLink
from afd.kv.block_pool import BlockPool
from afd.messages.codec import encode
from afd.messages.serving import (
    Lease,
    Refused,
    Resend,
    Submit,
    TokenLogprobs,
    Tokens,
    WorkerStats,
    worker_message_decoder,
)
from afd.model.sampling import Sampler
from afd.ops.select import select
from afd.sched.core import CoreLimits, WorkerCore
from afd.sched.latency import LatencyModel
from afd.sched.policy import Admission
from afd.sched.scheduler import Scheduler, SchedulerConfig
from afd.sched.sequence import MicroBatch, Output
from afd.types import FinishReason, SamplingParams
from tests.fuzz.campaign import MemoryGauge, generator, nothing_left, volume
from tests.fuzz.serving_messages import frame, gateway_message

VOCAB_SIZE = 100
NUM_STREAMS = 2
NAMES = [f"r{number}" for number in range(12)]
MAX_LEASE_S = 60.0
NUM_GATEWAYS = 3
QUIET_S = 0.4  # between two turns while nothing is said


@pytest.fixture(autouse=True)
def quiet_log() -> Iterator[None]:
    logger = logging.getLogger("afd")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


class Worker:
    """The worker's main loop without a model, and gateways that are connected to it."""

    def __init__(self) -> None:
        self.context = zmq.Context()
        self.link = GatewayLink(b"s" * 32, "inproc://worker", 1 << 20, context=self.context)
        self.gateways = []
        for number in range(NUM_GATEWAYS):
            dealer = self.context.socket(zmq.DEALER)
            dealer.identity, dealer.linger = b"gw-%d" % number, 0
            dealer.connect("inproc://worker")
            self.gateways.append(dealer)
        self.scheduler = Scheduler(
            SchedulerConfig(max_context=64, num_streams=NUM_STREAMS, max_num_seqs=8), BlockPool(24, 4)
        )
        admission = Admission(self.scheduler, LatencyModel(), policy="enforce", tpot_s=0.05, ttft_s=5.0)
        self.core = WorkerCore(0, self.scheduler, admission, CoreLimits(VOCAB_SIZE, 8, 60.0))
        self.core.set_ready(True, "", 100.0)
        self.now = 100.0
        self.in_flight: dict[int, MicroBatch] = {}
        self.num_tokens = 0
        self._sampler = Sampler(select("cpu", "float32"))
        self._torch = torch.Generator().manual_seed(0)

    def turn(self, *, steps: bool = True) -> None:
        """As the worker's loop: messages, leases, commits of what ran, new micro-batches."""
        self.now += 0.01
        for gateway, message in self.link.receive():
            self.core.receive(gateway, message, self.now)
        self.core.tick(self.now)
        if steps:
            for stream in range(NUM_STREAMS):
                self._step(stream)
        self.core.publish()
        self.core.report(self.now)
        self.link.send(self.core.take_outbox())

    def _step(self, stream: int) -> None:
        batch = self.in_flight.pop(stream, None)
        if batch is not None:
            self._commit(batch)
        batch = self.scheduler.schedule(stream)
        if batch is not None:
            self.in_flight[stream] = batch

    def _commit(self, batch: MicroBatch) -> None:
        seqs = [item.seq for item in batch.items if item.samples and item.seq.doomed is None]
        if seqs:
            logits = torch.randn(len(seqs), VOCAB_SIZE, generator=self._torch)
            histories = [(seq.prompt_ids(), seq.output_ids()) for seq in seqs]
            result = self._sampler.sample(
                logits, [seq.sampling for seq in seqs], [seq.num_output for seq in seqs], histories
            )
            assert result.invalid == ()
            assert all(0 <= token < VOCAB_SIZE for token in result.ids)
            sampled = dict(zip([seq.req_id for seq in seqs], result.ids, strict=True))
            entries = {seq.req_id: entry for seq, entry in zip(seqs, result.logprobs, strict=True)}
        else:
            sampled, entries = {}, {}
        outputs = []
        for progress in self.scheduler.commit(batch, sampled):
            entry = entries[progress.seq.req_id]
            outputs.append(Output(progress, None if entry is None else TokenLogprobs(*entry)))
            self.num_tokens += 1
        self.core.committed(outputs)

    def listeners(self) -> list[bytes]:
        """Gateways that live: they are told the load, half a second after it was told at the latest."""
        self.core.report(self.now + 0.5)
        return [to for to, message in self.core.take_outbox() if isinstance(message, WorkerStats)]

    def heard(self, gateway: int = 0) -> list[object]:
        """All that a gateway was sent, decoded."""
        messages = []
        while self.gateways[gateway].poll(0):
            messages.append(worker_message_decoder.decode(self.gateways[gateway].recv()))
        return messages

    def close(self) -> None:
        self.link.close()
        for dealer in self.gateways:
            dealer.close()
        self.context.term()


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


def test_mutated_frames() -> None:
    with nothing_left():
        worker = Worker()
        try:
            attack(worker)
            at_rest(worker)
        finally:
            worker.close()


def attack(worker: Worker) -> None:
    num_cases = volume(50_000, 2_500)
    rng = generator("frames to a worker", num_cases)
    gauge = MemoryGauge(num_cases)
    heard: dict[type, int] = {}
    for number in range(num_cases):
        raw = frame(rng, gateway_message(rng, NAMES, VOCAB_SIZE))
        dealer = rng.choice(worker.gateways)
        dealer.send_multipart([raw] if rng.random() < 0.97 else [raw, b""][: rng.randrange(3)] or [b""])
        if rng.random() < 0.3:
            worker.turn(steps=rng.random() < 0.8)
        if number % 50 == 0:
            worker.scheduler.check()
            for gateway in range(NUM_GATEWAYS):
                for message in worker.heard(gateway):
                    heard[type(message)] = heard.get(type(message), 0) + 1
        gauge.step()
    gauge.check()
    assert worker.num_tokens > num_cases // 20
    assert heard[Refused] > num_cases // 50
    assert heard[Tokens] > num_cases // 50


def at_rest(worker: Worker) -> None:
    """Once the gateways are silent, nothing is left of their requests."""
    worker.turn()
    for _ in range(round((MAX_LEASE_S + 10) / QUIET_S)):  # turn after turn: a jump would be a pause of the worker's own
        worker.now += QUIET_S
        worker.turn(steps=False)
    for _ in range(3):
        worker.turn()
    assert worker.scheduler.idle
    assert worker.scheduler.num_waiting == worker.scheduler.num_running == 0
    assert worker.scheduler.pool.num_free == worker.scheduler.pool.num_blocks
    assert worker.listeners() == []
    assert worker.core.take_outbox() == []
    worker.scheduler.check()


BAD_SAMPLING: dict[str, tuple[object, ...]] = {
    "temperature": (float("nan"), float("inf"), -1.0),
    "top_p": (float("nan"), 0.0, 1.5),
    "top_k": (-1,),
    "min_p": (float("nan"), -0.1, 1.1),
    "repetition_penalty": (0.0, float("nan"), float("inf")),
    "presence_penalty": (float("nan"), 1e300),
    "frequency_penalty": (float("inf"),),
    "stop_token_ids": ((VOCAB_SIZE,), (-1,)),
    "logit_bias": (((VOCAB_SIZE, 1.0),), ((-1, 1.0),), ((1, float("nan")),), ((1, float("inf")),)),
    "logprobs": (10**6, -2),
    "max_tokens": (0, -1, 2**63),
}


def test_sampling_parameters_that_no_sampler_can_use_are_refused(worker: Worker) -> None:
    """The gateway checks them, but a worker does not rely on it: one bad request must not end those beside it."""
    for name, values in BAD_SAMPLING.items():
        for value in values:
            fields: dict[str, Any] = {"max_tokens": 3, "seed": 1, name: value}
            worker.gateways[0].send(encode(Submit("r", 0, [1, 2], [], SamplingParams(**fields))))
            worker.turn()
            (message,) = [heard for heard in worker.heard() if not isinstance(heard, WorkerStats)]
            assert isinstance(message, Refused), (name, value)
            assert message.reason == "invalid"
            assert name in message.detail


@pytest.mark.parametrize("ttl_s", [float("nan"), float("inf"), 1e300, -1e300])
def test_a_lease_ends_whatever_was_asked_for(worker: Worker, ttl_s: float) -> None:
    worker.gateways[0].send(encode(Submit("r", 0, [1, 2], [], SamplingParams(max_tokens=40, seed=1))))
    worker.gateways[0].send(encode(Lease("gw", ttl_s)))
    worker.turn(steps=False)
    at_rest(worker)


def test_what_is_asked_for_again_is_sent_although_nothing_runs(worker: Worker) -> None:
    """A lost last chunk, asked for while the worker is idle; and a flood of such questions is not stored up."""
    worker.gateways[0].send(
        encode(
            Submit(
                "r",
                0,
                [1, 2],
                [],
                SamplingParams(
                    max_tokens=3,
                    seed=1,
                ),
            )
        )
    )
    for _ in range(6):
        worker.turn()
    worker.heard()
    for _ in range(500):
        worker.gateways[0].send(encode(Resend("r", 0, 0)))
    for _ in range(3):
        worker.turn()
    chunks = [chunk for message in worker.heard() if isinstance(message, Tokens) for chunk in message.chunks]
    assert len(chunks) >= 1
    assert {chunk.finish for chunk in chunks} == {FinishReason.LENGTH}
    assert len(chunks) <= 3


def test_any_number_of_gateways_is_forgotten_in_time(worker: Worker) -> None:
    """Strangers have no key; a key-holder that changes its identity all the time keeps nothing for long."""
    for number in range(300):
        dealer = worker.context.socket(zmq.DEALER)
        dealer.identity, dealer.linger = b"%d" % number, 0
        dealer.connect("inproc://worker")
        dealer.send(encode(Lease("gw", 1.0)))
        worker.turn()
        dealer.close()
    assert len(worker.listeners()) < 150
    at_rest(worker)


def test_random_is_repeatable() -> None:
    """The campaign's frames depend on the seed alone."""
    first, second = (
        [frame(rng, gateway_message(rng, NAMES, VOCAB_SIZE)) for _ in range(50)]
        for rng in (random.Random(4), random.Random(4))
    )
    assert first == second
