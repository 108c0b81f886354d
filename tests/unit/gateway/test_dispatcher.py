"""The dispatcher, scripted: messages, views and time in; what it sends and what requests get out."""

import pytest

from afd.errors import PeerLostError, RequestError, UnavailableError
from afd.gateway.dispatcher import (
    COOLING_MAX_S,
    HOPE_S,
    MAX_ATTEMPTS,
    PROBE_S,
    SILENCE_S,
    Dispatcher,
    DispatchLimits,
    WorkerError,
)
from afd.gateway.sequence import Sequence
from afd.messages.membership import ClusterView, Member, Plan, WorkerInfo
from afd.messages.serving import Abort, Lease, Refused, Resend, Submit, TokenChunk, Tokens, WorkerStats
from afd.types import FinishReason, SamplingParams


class Port:
    """Records what is sent."""

    def __init__(self):
        self.sent = []
        self.connected = {}

    def connect(self, key, endpoint):
        self.connected[key] = endpoint

    def disconnect(self, key):
        del self.connected[key]

    def send(self, key, message):
        self.sent.append((key, message))

    def take(self, kind):
        taken = [(key, message) for key, message in self.sent if isinstance(message, kind)]
        self.sent = [entry for entry in self.sent if not isinstance(entry[1], kind)]
        return taken


class Sink:
    """Records what a request gets."""

    def __init__(self):
        self.ids = []
        self.finish = None
        self.error = None

    def push(self, sequence, delta, now):
        self.ids += delta.ids
        self.finish = delta.finish or self.finish

    def fail(self, error):
        self.error = error


def member(name, rank=0, *, ready=True, draining=False, endpoint=None):
    info = WorkerInfo(
        role="attention", incarnation=name, host="h", pid=1, config_hash="", serving=endpoint or f"tcp://{name}"
    )
    return Member(info=info, rank=rank, ready=ready, draining=draining)


def view(*members):
    return ClusterView("c", 1, 1, 1, 1, "m", "", "hybrid", Plan(), list(members))


def stats(rank=0, **fields):
    values = {"num_running": 0, "num_waiting": 0, "kv_blocks_total": 100, "kv_blocks_free": 100, "step_s": 0.01}
    return WorkerStats(rank=rank, **{**values, **fields})


class Scene:
    """A dispatcher with workers a, b, ... that have all reported at time 0."""

    def __init__(self, names="a", **limits):
        self.port = Port()
        self.dispatcher = Dispatcher("gateway", DispatchLimits(**limits), self.port)
        self.members = {name: member(name, rank) for rank, name in enumerate(names)}
        self.publish(0.0)
        for rank, name in enumerate(names):
            self.say(name, stats(rank), 0.0)
        self.num_requests = 0

    def publish(self, now):
        self.dispatcher.on_view(view(*self.members.values()), now)

    def say(self, name, message, now):
        self.dispatcher.on_message(name, message, now)

    def alive(self, now):
        """Everyone reports, then the clock ticks."""
        for name, m in self.members.items():
            self.say(name, stats(m.rank), now)
        self.dispatcher.tick(now)

    def submit(self, now=0.0, *, num_prompt=3, max_tokens=10, priority=0, ttft_s=None, count=1):
        sink, sequences = Sink(), []
        for choice in range(count):
            self.num_requests += 1
            sampling = SamplingParams(max_tokens=max_tokens, seed=7, choice=choice)
            sequences.append(
                Sequence(f"r{self.num_requests}", choice, [1] * num_prompt, sampling, sink, priority=priority)
            )
        self.dispatcher.submit(sequences, now, ttft_s=ttft_s)
        return sequences[0] if count == 1 else sequences

    def tokens(self, name, sequence, ids, now, finish=None, **fields):
        chunk = TokenChunk(sequence.req_id, sequence.attempt, len(sequence.output_ids), ids, finish=finish, **fields)
        self.say(name, Tokens([chunk]), now)

    def refuse(self, name, sequence, now, reason="capacity", retry_after_s=1.0):
        self.say(name, Refused(sequence.req_id, sequence.attempt, reason, "detail", retry_after_s), now)

    def submits(self):
        return [(key, message.req_id) for key, message in self.port.take(Submit)]


# --- the ordinary way -----------------------------------------------------------------------------------


def test_a_request_from_submission_to_its_last_token():
    scene = Scene()
    request = scene.submit()
    assert scene.submits() == [("a", "r1")]
    scene.tokens("a", request, [5, 6], 0.1)
    scene.tokens("a", request, [7], 0.2, FinishReason.LENGTH)
    assert request.sink.ids == [5, 6, 7]
    assert request.sink.finish is FinishReason.LENGTH
    assert scene.dispatcher.num_running == 0
    assert scene.dispatcher.workers["a"].outstanding_tokens == 0


def test_the_least_loaded_worker_is_chosen():
    scene = Scene("abc")
    scene.submit(num_prompt=50)
    scene.submit(num_prompt=5)
    scene.submit(num_prompt=5)
    scene.submit(num_prompt=5)
    assert [key for key, _ in scene.submits()] == ["a", "b", "c", "b"]


def test_a_worker_with_a_queue_or_full_kv_comes_last():
    scene = Scene("ab")
    scene.say("a", stats(0, num_waiting=3), 0.1)
    scene.submit()
    assert scene.submits() == [("b", "r1")]
    other = Scene("ab")
    other.say("a", stats(0, kv_blocks_free=10), 0.1)
    other.submit()
    assert other.submits() == [("b", "r1")]


@pytest.mark.parametrize("state", [{"ready": False}, {"draining": True}])
def test_a_worker_that_is_not_ready_or_drains_gets_nothing(state):
    scene = Scene("ab")
    scene.members["a"] = member("a", 0, **state)
    scene.publish(0.0)
    scene.submit()
    scene.submit()
    assert [key for key, _ in scene.submits()] == ["b", "b"]


def test_without_a_serving_worker_requests_are_refused():
    scene = Scene("")
    with pytest.raises(UnavailableError) as error:
        scene.submit()
    assert error.value.code == "not_ready"


def test_a_worker_serves_only_once_it_has_been_heard():
    scene = Scene("")
    scene.members["a"] = member("a")
    scene.publish(0.0)
    with pytest.raises(UnavailableError):
        scene.submit()
    scene.say("a", stats(), 0.1)
    request = scene.submit(0.1)
    assert scene.submits() == [("a", request.req_id)]


def test_abort_reaches_the_worker_once():
    scene = Scene()
    request = scene.submit()
    scene.dispatcher.abort([request], 0.1)
    scene.dispatcher.abort([request], 0.2)
    assert scene.port.take(Abort) == [("a", Abort(["r1"]))]
    scene.tokens("a", request, [5], 0.3)
    assert request.sink.ids == []


def test_leases_go_out_every_second_and_name_the_living_now_and_then():
    scene = Scene()
    scene.port.take(Lease)
    request = scene.submit()
    for tenth in range(1, 60):
        scene.alive(tenth / 10)
    leases = [message for _, message in scene.port.take(Lease)]
    assert 5 <= len(leases) <= 6
    assert [lease.live_req_ids for lease in leases if lease.live_req_ids is not None] == [[request.req_id]]


# --- refusals and the queue -----------------------------------------------------------------------------


def test_a_refused_request_goes_to_another_worker():
    scene = Scene("ab")
    request = scene.submit()
    scene.refuse("a", request, 0.1)
    assert scene.submits() == [("a", "r1"), ("b", "r1")]
    assert request.attempt == 0


def test_refused_everywhere_it_waits_and_is_tried_again():
    scene = Scene()
    request = scene.submit()
    scene.refuse("a", request, 0.1, retry_after_s=0.5)
    scene.alive(0.2)
    assert scene.submits() == [("a", "r1")]
    assert len(scene.dispatcher.queue) == 1
    scene.alive(0.61)
    assert scene.submits() == [("a", "r1")]
    assert len(scene.dispatcher.queue) == 0


def test_a_finished_request_makes_room_at_once():
    scene = Scene()
    running, waiting = scene.submit(), scene.submit()
    scene.refuse("a", waiting, 0.1, retry_after_s=1.0)
    scene.submits()
    scene.tokens("a", running, [1], 0.2, FinishReason.STOP)
    assert scene.submits() == [("a", waiting.req_id)]


def test_the_queue_is_by_priority_then_age():
    scene = Scene()
    first = scene.submit()
    scene.refuse("a", first, 0.0, retry_after_s=1.0)
    scene.submit()
    urgent = scene.submit(priority=-1)
    scene.submits()
    scene.alive(1.1)
    assert [req_id for _, req_id in scene.submits()] == [urgent.req_id, "r1", "r2"]


def test_a_worker_that_refuses_is_asked_a_few_at_a_time():
    scene = Scene()
    first = scene.submit()
    scene.refuse("a", first, 0.0, retry_after_s=0.1)
    for _ in range(50):
        scene.submit()
    scene.submits()
    scene.alive(0.2)
    assert len(scene.submits()) <= 4


def test_a_full_queue_refuses_at_once():
    scene = Scene(max_queue=3)
    scene.refuse("a", scene.submit(), 0.0)
    scene.submit()
    with pytest.raises(UnavailableError) as error:
        scene.submit(count=2)
    assert error.value.code == "queue_full"
    assert error.value.retry_after_s >= 1
    scene.submit()


def test_enforced_ttft_refuses_when_the_predicted_wait_is_too_long():
    scene = Scene(enforce=True, ttft_s=2.0)
    scene.say("a", stats(predicted_wait_s=7.0), 0.1)
    with pytest.raises(UnavailableError) as error:
        scene.submit(0.1)
    assert (error.value.code, error.value.retry_after_s) == ("overloaded", 7)
    scene.submit(0.1, ttft_s=10.0)  # its own, looser target


def test_enforced_ttft_a_refusal_that_predicts_too_long_a_wait_is_final():
    scene = Scene("ab", enforce=True, ttft_s=2.0)
    request = scene.submit()
    scene.refuse("a", request, 0.1, retry_after_s=5.0)
    assert request.sink.error is None  # b may have room
    scene.refuse("b", request, 0.2, retry_after_s=4.0)
    assert isinstance(request.sink.error, UnavailableError)
    assert request.sink.error.retry_after_s == 4


def test_enforced_ttft_is_told_to_the_worker_and_ends_the_wait():
    scene = Scene(enforce=True, ttft_s=2.0)
    request = scene.submit(0.5)
    (_, message), *_ = scene.port.take(Submit)
    assert message.ttft_deadline_s == 2.0
    scene.refuse("a", request, 0.6, retry_after_s=1.0)
    scene.alive(1.0)
    scene.alive(1.5)
    scene.alive(1.61)
    (_, message), *_ = scene.port.take(Submit)
    assert 0.8 < message.ttft_deadline_s < 0.9
    scene.refuse("a", request, 1.7, retry_after_s=0.7)
    scene.alive(2.55)
    assert request.sink.error.code == "overloaded"


def test_without_enforcement_the_wait_is_bounded_by_the_request_timeout():
    scene = Scene(request_timeout_s=10.0)
    request = scene.submit()
    for second in range(1, 12):
        if request.req_id in scene.dispatcher.workers["a"].active:
            scene.refuse("a", request, second - 0.5)
        scene.alive(float(second))
    assert isinstance(request.sink.error, UnavailableError)


def test_an_invalid_request_is_the_clients_fault():
    scene = Scene("ab")
    request = scene.submit()
    scene.refuse("a", request, 0.1, reason="invalid")
    assert isinstance(request.sink.error, RequestError)
    assert len(scene.submits()) == 1


def test_cooling_is_bounded_whatever_the_worker_says():
    scene = Scene()
    scene.refuse("a", scene.submit(), 0.0, retry_after_s=1e9)
    scene.submits()
    scene.alive(COOLING_MAX_S + 0.1)
    assert scene.submits() == [("a", "r1")]


# --- losses ---------------------------------------------------------------------------------------------


def test_a_worker_that_leaves_hands_its_requests_to_another():
    scene = Scene("ab")
    request = scene.submit()
    scene.tokens("a", request, [5, 6], 0.1)
    del scene.members["a"]
    scene.publish(0.2)
    assert "a" not in scene.port.connected
    *_, (key, message) = scene.port.take(Submit)
    assert (key, message.attempt, message.output_ids, message.sampling.seed) == ("b", 1, [5, 6], 7)
    assert message.ttft_deadline_s == 0
    scene.tokens("b", request, [7], 0.3, FinishReason.LENGTH)
    assert request.sink.ids == [5, 6, 7]
    assert scene.dispatcher.counters.migrated == 1


def test_without_another_worker_the_request_fails():
    scene = Scene()
    request = scene.submit()
    del scene.members["a"]
    scene.publish(0.2)
    assert isinstance(request.sink.error, PeerLostError)
    assert "attention worker 0" in str(request.sink.error)


def test_a_silent_worker_is_lost_and_told_so():
    scene = Scene("ab")
    request = scene.submit()
    for tenth in range(1, 25):
        scene.say("b", stats(1), tenth / 10)
        scene.dispatcher.tick(tenth / 10)
    assert scene.port.take(Abort) == [("a", Abort(["r1"]))]
    assert scene.submits()[-1] == ("b", "r1")
    scene.tokens("b", request, [1], 2.5)
    assert request.sink.ids == [1]
    late = TokenChunk("r1", 0, 0, [9])
    scene.say("a", Tokens([late]), 2.6)  # it comes back: its old tokens count no more, its room does
    assert request.sink.ids == [1]
    assert scene.dispatcher.workers["a"].serving


def test_a_pause_of_our_own_is_not_the_workers_silence():
    scene = Scene()
    scene.submit()
    scene.alive(0.1)
    scene.dispatcher.tick(10.0)
    assert scene.dispatcher.workers["a"].serving
    scene.dispatcher.tick(10.1)
    for tenth in range(102, 102 + int(SILENCE_S * 10) + 1):
        scene.dispatcher.tick(tenth / 10)
    assert not scene.dispatcher.workers["a"].serving


def test_a_retryable_failure_moves_the_request_away_from_that_worker():
    scene = Scene("ab")
    request = scene.submit()
    scene.tokens("a", request, [5], 0.1)
    scene.tokens("a", request, [6], 0.2, FinishReason.ERROR, error="ffn lost", retryable=True)
    assert request.sink.ids == [5, 6]
    assert request.sink.finish is None
    assert scene.submits()[-1] == ("b", "r1")


def test_a_final_failure_carries_the_workers_words():
    scene = Scene("ab")
    request = scene.submit()
    scene.tokens("a", request, [], 0.1, FinishReason.ERROR, error="NaN in layer 3", retryable=False)
    assert isinstance(request.sink.error, WorkerError)
    assert "NaN in layer 3" in str(request.sink.error)


def test_a_request_that_fails_everywhere_is_given_up():
    scene = Scene("ab")
    request = scene.submit()
    for _ in range(20):
        if request.sink.error is not None:
            break
        scene.tokens(request.worker_key, request, [], 0.1, FinishReason.ERROR, error="boom", retryable=True)
    assert isinstance(request.sink.error, PeerLostError)
    assert request.attempt == MAX_ATTEMPTS - 1


def test_the_last_token_was_delivered_only_the_word_of_it_was_lost():
    scene = Scene("ab")
    request = scene.submit(max_tokens=2)
    scene.tokens("a", request, [5, 6], 0.1)
    del scene.members["a"]
    scene.publish(0.2)
    assert request.sink.finish is FinishReason.LENGTH
    assert len(scene.submits()) == 1


def test_migration_waits_for_a_worker_that_is_only_just_there():
    scene = Scene("a")
    request = scene.submit()
    del scene.members["a"]
    scene.members["b"] = member("b", 1)
    scene.publish(0.2)
    assert request.sink.error is None
    scene.say("b", stats(1), 0.3)
    assert scene.submits()[-1] == ("b", "r1")


def test_migration_to_a_worker_that_never_answers_ends():
    scene = Scene("a")
    request = scene.submit()
    del scene.members["a"]
    scene.members["b"] = member("b", 1)
    scene.publish(0.2)
    scene.dispatcher.tick(0.2 + HOPE_S - 0.1)
    assert request.sink.error is None
    scene.dispatcher.tick(0.2 + HOPE_S)
    assert isinstance(request.sink.error, PeerLostError)


def test_migration_survives_a_short_while_without_readiness():
    """When members change, the workers that stay adopt a new epoch and are not ready for a moment."""
    scene = Scene("ab")
    request = scene.submit()
    del scene.members["a"]
    scene.publish(0.2)
    scene.refuse("b", request, 0.25, reason="not_ready", retry_after_s=0.1)
    scene.members["b"] = member("b", 1, ready=False)
    scene.publish(0.3)
    scene.dispatcher.tick(0.5)
    assert request.sink.error is None
    scene.members["b"] = member("b", 1)
    scene.publish(0.6)
    assert scene.submits()[-1] == ("b", "r1")


def test_migration_survives_a_full_worker():
    scene = Scene("ab")
    request = scene.submit()
    del scene.members["a"]
    scene.publish(0.2)
    scene.refuse("b", request, 0.3)
    scene.alive(1.4)
    assert scene.submits()[-1] == ("b", "r1")
    assert request.sink.error is None


# --- lost messages --------------------------------------------------------------------------------------


def test_a_gap_is_asked_for_once_in_a_while():
    scene = Scene()
    request = scene.submit()
    scene.tokens("a", request, [5], 0.1)
    for now in (0.5, 0.6, 0.9):
        scene.say("a", Tokens([TokenChunk("r1", 0, 3, [8])]), now)
    assert scene.port.take(Resend) == [("a", Resend("r1", 0, 1)), ("a", Resend("r1", 0, 1))]
    scene.say("a", Tokens([TokenChunk("r1", 0, 1, [6, 7, 8])]), 1.0)
    assert request.sink.ids == [5, 6, 7, 8]


def test_a_silent_request_is_asked_after():
    scene = Scene()
    scene.submit()
    for tenth in range(1, int(PROBE_S * 10) + 20):
        scene.alive(tenth / 10)
    assert scene.port.take(Resend) == [("a", Resend("r1", 0, 0))]


def test_a_lost_submit_is_sent_again_as_a_new_attempt():
    scene = Scene()
    request = scene.submit()
    scene.refuse("a", request, 6.0, reason="unknown")
    assert [m.attempt for _, m in scene.port.take(Submit)] == [0, 1]
    assert request.sink.error is None


def test_words_of_unknown_workers_and_requests_are_ignored():
    scene = Scene()
    request = scene.submit()
    scene.say("stranger", Tokens([TokenChunk("r1", 0, 0, [1])]), 0.1)
    scene.say("a", Tokens([TokenChunk("r99", 0, 0, [1])]), 0.1)
    scene.say("a", Refused("r99", 0, "capacity", ""), 0.1)
    scene.say("a", Refused("r1", 5, "capacity", ""), 0.1)
    assert request.sink.ids == []
    assert scene.dispatcher.num_running == 1


def test_a_worker_that_moves_is_connected_anew():
    scene = Scene()
    scene.members["a"] = member("a", endpoint="tcp://elsewhere")
    scene.publish(1.0)
    assert scene.port.connected == {"a": "tcp://elsewhere"}
