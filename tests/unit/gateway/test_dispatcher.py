"""The dispatcher, scripted: the ordinary way, refusals and the queue."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd.errors import RequestError, UnavailableError
from afd.gateway.dispatcher import COOLING_MAX_S
from afd.messages.serving import Abort, Lease, Submit
from afd.types import FinishReason
from tests.fakes.dispatch_scene import Scene, member, stats

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


@given(
    enforce=st.booleans(),
    num_waiting=st.integers(0, 4),
    wait_s=st.floats(0.0, 9.0),
    interval_s=st.floats(0.0, 3.0),
    priority=st.integers(-1, 1),
    ttft_s=st.none() | st.floats(0.5, 9.0),
    num_prompt=st.integers(1, 500),
    count=st.integers(1, 2),
)
def test_what_is_refused_unread_would_be_refused_when_read(
    enforce, num_waiting, wait_s, interval_s, priority, ttft_s, num_prompt, count
):
    scene = Scene(enforce=enforce, ttft_s=4.0, max_queue=4)
    for _ in range(num_waiting):
        request = scene.submit(0.0)
        scene.refuse("a", request, 0.0, retry_after_s=0.5)
    places_s = [wait_s + interval_s * idx for idx in range(4)]
    scene.say("a", stats(places_s=places_s, prefill_token_s=0.01), 0.1)
    try:
        scene.dispatcher.check_room(0.1, priority=priority, ttft_s=ttft_s)
    except UnavailableError:
        with pytest.raises(UnavailableError):
            scene.submit(0.1, num_prompt=num_prompt, count=count, priority=priority, ttft_s=ttft_s)


def test_enforced_ttft_refuses_when_the_predicted_wait_is_too_long():
    scene = Scene(enforce=True, ttft_s=2.0)
    scene.refuse("a", scene.submit(), 0.1, retry_after_s=1.0)
    scene.say("a", stats(places_s=[7.0, 7.0]), 0.1)
    with pytest.raises(UnavailableError) as error:
        scene.submit(0.1)
    assert (error.value.code, error.value.retry_after_s) == ("overloaded", 7)
    scene.submit(0.1, ttft_s=12.0)  # its own, looser target


def test_a_worker_that_refused_nobody_is_asked_whatever_is_forecast():
    scene = Scene(enforce=True, ttft_s=2.0)
    scene.say("a", stats(places_s=[7.0, 12.0]), 0.1)
    scene.submit(0.1)
    assert len(scene.submits()) == 1


def test_the_first_in_line_may_try_although_the_forecast_says_no():
    """Nothing else would show that the forecast is wrong."""
    scene = Scene(enforce=True, ttft_s=2.0)
    first, second = scene.submit(), scene.submit()
    scene.refuse("a", first, 0.1, retry_after_s=4.0)
    assert first.sink.error is None
    scene.refuse("a", second, 0.1, retry_after_s=4.0)
    assert second.sink.error.code == "overloaded"


def test_enforced_ttft_a_refusal_that_predicts_too_long_a_wait_is_final():
    scene = Scene("ab", enforce=True, ttft_s=2.0)
    request = scene.submit()
    scene.refuse("a", request, 0.1, retry_after_s=9.0)
    assert request.sink.error is None  # b may have room
    scene.refuse("b", request, 0.2, retry_after_s=8.0)
    assert isinstance(request.sink.error, UnavailableError)
    assert request.sink.error.retry_after_s == 8


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
