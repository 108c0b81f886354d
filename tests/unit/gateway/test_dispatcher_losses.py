"""The dispatcher, scripted: lost workers, failures, lost messages."""

from afd.errors import PeerLostError
from afd.gateway.dispatcher import MAX_LOSSES
from afd.messages.serving import Abort, Lease, Refused, Resend, Submit, TokenChunk, Tokens
from afd.types import FinishReason
from tests.fakes.dispatch_scene import Scene, member, stats

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


def test_a_queued_request_waits_for_a_worker_that_is_away_for_a_while():
    """It was taken; the client has not got a token yet, and need not hear of a short loss either."""
    scene = Scene(recovery_timeout_s=20.0)
    request = scene.submit()
    scene.refuse("a", request, 0.1)
    scene.members["a"] = member("a", ready=False)
    scene.publish(0.2)
    scene.dispatcher.tick(5.0)
    assert request.sink.error is None
    scene.members["a"] = member("a")
    scene.publish(5.1)
    scene.alive(5.2)
    assert scene.submits()[-1] == ("a", "r1")


def test_a_silent_worker_keeps_its_requests_where_there_is_no_other():
    scene = Scene()
    request = scene.submit()
    scene.tokens("a", request, [5], 0.0)
    for tenth in range(1, 80):
        scene.dispatcher.tick(tenth / 10)
    assert not scene.dispatcher.workers["a"].serving
    assert scene.port.take(Abort) == [] and len(scene.submits()) == 1
    scene.tokens("a", request, [6], 8.0)  # it was paused only
    assert request.sink.ids == [5, 6] and scene.dispatcher.workers["a"].serving


def test_a_silent_workers_requests_move_as_soon_as_there_is_another():
    scene = Scene(silence_s=2.0)
    scene.submit()
    for tenth in range(1, 30):
        scene.dispatcher.tick(tenth / 10)
    scene.members["b"] = member("b", 1)
    scene.publish(3.0)
    scene.say("b", stats(1), 3.0)
    scene.dispatcher.tick(3.1)
    assert scene.port.take(Abort) == [("a", Abort(["r1"]))]
    assert scene.submits()[-1] == ("b", "r1")


def test_what_a_worker_failed_is_tried_there_again_where_there_is_no_other():
    scene = Scene()
    request = scene.submit()
    scene.tokens("a", request, [5], 0.1, FinishReason.ERROR, error="ffn lost", retryable=True)
    assert scene.submits() == [("a", "r1"), ("a", "r1")]
    assert request.attempt == 1


def test_what_a_worker_failed_that_cannot_serve_waits_for_one_that_may():
    scene = Scene("ab")
    for name, rank in (("a", 0), ("b", 1)):
        scene.members[name] = member(name, rank, ready=name == "a")
    scene.publish(0.0)
    request = scene.submit()
    assert request.worker_key == "a"
    scene.members = {"a": member("a", ready=False), "b": member("b", 1, ready=False)}
    scene.publish(0.05)
    scene.tokens("a", request, [5], 0.1, FinishReason.ERROR, error="ffn/0 is lost", retryable=True)
    assert request.sink.error is None
    scene.members["b"] = member("b", 1)
    scene.publish(0.2)
    assert scene.submits()[-1] == ("b", "r1")


def test_after_a_pause_of_our_own_that_may_have_cost_the_lease_every_request_is_asked_after_at_once():
    scene = Scene(lease_s=3.0)
    scene.submit()
    scene.submit()
    scene.alive(0.1)
    scene.dispatcher.tick(1.5)
    assert scene.port.take(Resend) == []
    scene.port.take(Lease)
    scene.dispatcher.tick(5.5)
    assert [message.req_id for _, message in scene.port.take(Resend)] == ["r1", "r2"]
    assert len(scene.port.take(Lease)) == 1


def test_requests_that_workers_forgot_in_our_pauses_are_never_given_up():
    scene = Scene()
    request = scene.submit()
    for second in range(1, 3 * MAX_LOSSES):
        scene.refuse("a", request, float(second), reason="unknown")
    assert request.sink.error is None and request.attempt == 3 * MAX_LOSSES - 1


def test_a_pause_of_our_own_is_not_the_workers_silence():
    scene = Scene()
    scene.submit()
    scene.alive(0.1)
    scene.dispatcher.tick(10.0)
    assert scene.dispatcher.workers["a"].serving
    scene.dispatcher.tick(10.1)
    for tenth in range(102, 102 + int(scene.dispatcher.limits.silence_s * 10) + 1):
        scene.dispatcher.tick(tenth / 10)
    assert not scene.dispatcher.workers["a"].serving


def test_a_request_that_fails_everywhere_is_given_up():
    scene = Scene("ab")
    request = scene.submit()
    for _ in range(20):
        if request.sink.error is not None:
            break
        scene.tokens(request.worker_key, request, [], 0.1, FinishReason.ERROR, error="boom", retryable=True)
    assert isinstance(request.sink.error, PeerLostError)
    assert request.attempt == MAX_LOSSES - 1


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
    scene = Scene("a", recovery_timeout_s=10.0)
    request = scene.submit()
    del scene.members["a"]
    scene.members["b"] = member("b", 1)
    scene.publish(0.2)
    scene.dispatcher.tick(10.1)
    assert request.sink.error is None
    scene.dispatcher.tick(10.3)
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
