"""The worker's end of the gateway conversation: what each message does, over a real ROUTER/DEALER pair."""

import random

import pytest
import zmq

from afd.attention.engine import Output
from afd.attention.frontend import FINISHED_KEPT, Frontend
from afd.attention.requests import RequestBook
from afd.kv.block_pool import BlockPool
from afd.messages.codec import encode
from afd.messages.serving import (
    Abort,
    Lease,
    Refused,
    Resend,
    Submit,
    TokenChunk,
    Tokens,
    lease_identity,
    worker_message_decoder,
)
from afd.sched.latency import LatencyModel
from afd.sched.policy import Admission
from afd.sched.scheduler import Scheduler, SchedulerConfig
from afd.types import FinishReason, SamplingParams

GATEWAY = b"gw-1"


class Harness:
    """A worker's frontend and book with one connected gateway; messages go through ZeroMQ, decisions are real."""

    def __init__(self):
        self.context = zmq.Context()
        router, self.dealer = self.context.socket(zmq.ROUTER), self.context.socket(zmq.DEALER)
        for socket in (router, self.dealer):
            socket.linger = 0
        router.bind("inproc://worker")
        self.dealer.identity = GATEWAY
        self.dealer.connect("inproc://worker")
        self.scheduler = Scheduler(SchedulerConfig(max_context=64, num_streams=1), BlockPool(8, 4))
        self.frontend = Frontend(router)
        self.admission = Admission(self.scheduler, LatencyModel(), policy="off", tpot_s=0.05, ttft_s=5.0)
        self.book = RequestBook(self.frontend, self.scheduler, self.admission, vocab_size=100, max_waiting=3)
        self.book.not_accepting = ""

    def tell(self, message, now=0.0):
        self.dealer.send(message if isinstance(message, bytes) else encode(message))
        self.pump(now)

    def pump(self, now=0.0):
        for gateway, message in self.frontend.receive(now):
            self.book.handle(gateway, message, now)

    def heard(self):
        messages = []
        while self.dealer.poll(0):
            messages.append(worker_message_decoder.decode(self.dealer.recv()))
        return messages

    def step(self, token=5):
        batch = self.scheduler.schedule(0)
        sampled = {item.seq.req_id: token for item in batch.items if item.samples}
        self.book.publish([Output(p, None) for p in self.scheduler.commit(batch, sampled)])

    def close(self):
        self.frontend.close()
        self.dealer.close()
        self.context.term()


@pytest.fixture
def worker():
    harness = Harness()
    yield harness
    harness.close()


def submit(name="r", prompt=(1, 2, 3), max_tokens=3, attempt=0, output=()):
    return Submit(name, attempt, list(prompt), list(output), SamplingParams(max_tokens=max_tokens, seed=1))


def test_tokens_come_back_with_their_output_index(worker):
    worker.tell(submit())
    for _ in range(3):
        worker.step()
    chunks = [chunk for message in worker.heard() for chunk in message.chunks]
    assert [(c.first_idx, c.ids, c.finish) for c in chunks] == [
        (0, [5], None),
        (1, [5], None),
        (2, [5], FinishReason.LENGTH),
    ]


@pytest.mark.parametrize(
    ("message", "reason", "detail"),
    [
        (submit(prompt=[]), "invalid", "empty"),
        (submit(prompt=[100]), "invalid", "0..99"),
        (submit(prompt=[-1]), "invalid", "0..99"),
        (submit(max_tokens=0), "invalid", "max_tokens"),
        (submit(max_tokens=1, output=[7]), "invalid", "max_tokens"),
        (submit(max_tokens=62), "invalid", "context of 64"),
        (submit(max_tokens=30), "invalid", "KV cache of 32"),
    ],
)
def test_impossible_requests_are_refused_with_the_reason(worker, message, reason, detail):
    worker.tell(message)
    [refused] = worker.heard()
    assert isinstance(refused, Refused) and refused.reason == reason and detail in refused.detail
    assert worker.scheduler.idle


def test_refusals_by_state(worker):
    worker.book.not_accepting = "waiting for the FFN workers"
    worker.tell(submit())
    assert worker.heard()[0].reason == "not_ready"
    worker.book.not_accepting, worker.book.draining = "", True
    worker.tell(submit())
    assert worker.heard()[0].reason == "draining"
    worker.book.draining = False
    for idx in range(3):
        worker.tell(submit(f"r{idx}"))
    worker.tell(submit("one too many"))
    assert worker.heard()[0].reason == "capacity"


def test_a_repeated_submit_is_ignored_and_a_newer_attempt_replaces(worker):
    worker.tell(submit())
    worker.tell(submit())
    assert worker.scheduler.num_waiting == 1
    worker.tell(submit(attempt=1, output=[9]))
    worker.step()
    [message] = worker.heard()
    assert [(c.attempt, c.first_idx) for c in message.chunks] == [(1, 1)]
    worker.tell(submit(attempt=0))
    assert worker.scheduler.get("r").attempt == 1, "an old attempt must not replace a newer one"


def test_resend_from_the_gap_also_after_the_end(worker):
    worker.tell(submit())
    for _ in range(3):
        worker.step()
    worker.heard()
    worker.tell(Resend("r", 0, 1))
    worker.frontend.flush()
    assert worker.heard() == [Tokens([TokenChunk("r", 0, 1, [5, 5], finish=FinishReason.LENGTH)])]
    for unknown in (Resend("r", 7, 0), Resend("nobody", 0, 0)):
        worker.tell(unknown)
    assert [(m.req_id, m.attempt, m.reason) for m in worker.heard()] == [("r", 7, "unknown"), ("nobody", 0, "unknown")]


def test_records_of_ended_requests_are_bounded(worker):
    for idx in range(FINISHED_KEPT + 50):
        worker.tell(submit(f"r{idx}", max_tokens=1))
        worker.step()
    assert len(worker.frontend._records) == FINISHED_KEPT


def test_abort_and_lists_of_live_requests_free_everything(worker):
    for name in ("a", "b", "c"):
        worker.tell(submit(name))
    worker.tell(Abort(["a", "unknown"]))
    assert worker.scheduler.get("a") is None
    worker.tell(Lease("gw", 3.0, ["b"]))
    assert [seq.req_id for seq in worker.scheduler.sequences()] == ["b"]


def test_a_silent_gateway_loses_its_requests(worker):
    worker.tell(Lease("gw", 3.0), now=10.0)
    worker.tell(submit(), now=10.0)
    assert worker.frontend.ended_leases(12.9) == []
    [gateway] = worker.frontend.ended_leases(13.1)
    assert worker.book.end_gateway(gateway) == 1 and worker.scheduler.idle


def test_fail_all_ends_every_request_with_an_error(worker):
    worker.tell(submit("a"))
    worker.tell(submit("b"))
    assert worker.book.fail_all("ffn/0 is lost", retryable=False) == 2
    chunks = [c for m in worker.heard() for c in m.chunks]
    assert {(c.req_id, c.finish, c.error) for c in chunks} == {
        ("a", FinishReason.ERROR, "ffn/0 is lost"),
        ("b", FinishReason.ERROR, "ffn/0 is lost"),
    }
    assert worker.scheduler.idle


def test_garbage_never_reaches_the_scheduler(worker):
    rng = random.Random(1)
    valid = encode(submit())
    for idx in range(2000):
        frame = bytearray(valid)
        for _ in range(rng.randrange(1, 6)):
            frame[rng.randrange(len(frame))] = rng.randrange(256)
        worker.dealer.send(bytes(frame[: rng.randrange(len(frame) + 1)]))
        if idx % 100 == 99:
            worker.dealer.send_multipart([b"", b"", b"x"])
            worker.pump()
            for seq in worker.scheduler.sequences():
                assert all(0 <= token < 100 for token in seq.tokens)
                worker.book.handle(GATEWAY, Abort([seq.req_id]), 0.0)
            worker.heard()
    assert worker.scheduler.idle


def test_under_enforcement_a_full_worker_refuses_and_says_when_to_come_again(worker):
    worker.admission.policy = "enforce"
    worker.tell(submit("first", max_tokens=3))
    assert worker.scheduler.get("first").tpot_s == 0.05
    worker.step()
    worker.tell(Submit("tight", 0, [1, 2], [], SamplingParams(max_tokens=3, seed=1), tpot_s=0.001))
    refused = [message for message in worker.heard() if isinstance(message, Refused)]
    assert [(r.req_id, r.reason) for r in refused] == [("tight", "capacity")]
    assert refused[0].retry_after_s > 1.0 and "tightest target here is 1 ms" in refused[0].detail
    assert worker.scheduler.get("tight") is None
    worker.tell(Submit("tight", 1, [1, 2], [], SamplingParams(max_tokens=3, seed=1), tpot_s=0.001))
    assert worker.scheduler.get("tight").tpot_s == 0.001  # it ran elsewhere: it is not new


def test_a_request_that_is_impossible_does_not_reach_admission(worker):
    worker.admission.policy = "enforce"
    worker.tell(submit(prompt=[100]))
    assert (worker.admission.num_admitted, worker.admission.num_refused) == (0, 0)


def test_leases_over_a_connection_of_their_own_keep_the_gateways_requests(worker):
    """The one with the requests is quiet: its event loop is busy, or its submissions queue up here."""
    worker.tell(submit("a"), now=0.0)
    keeper = worker.context.socket(zmq.DEALER)
    keeper.linger = 0
    keeper.identity = lease_identity(GATEWAY.decode())
    keeper.connect("inproc://worker")
    try:
        keeper.send(encode(Lease(GATEWAY.decode(), 3.0)))
        worker.pump(now=4.0)
        assert worker.frontend.ended_leases(6.9) == []
        assert list(worker.frontend.gateways) == [GATEWAY]
        assert worker.frontend.ended_leases(7.1) == [GATEWAY]
    finally:
        keeper.close()


def test_messages_are_taken_one_at_a_time(worker):
    """So that the worker can go on with its steps in the midst of a flood; nothing of it is lost."""
    for name in "abc":
        worker.dealer.send(encode(submit(name)))
    taken = [next(worker.frontend.receive(0.0))[1].req_id for _ in range(2)]
    assert worker.frontend.has_input
    worker.pump()
    assert taken == ["a", "b"]
    assert worker.scheduler.get("c") is not None
