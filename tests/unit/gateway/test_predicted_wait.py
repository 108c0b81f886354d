"""The gateway's forecast: how long a newcomer would wait, who is turned away at once for it, and who is let in."""

import random

import pytest

from afd.errors import UnavailableError
from afd.gateway.admission import AdmissionQueue, Correction, predicted_wait_s, prefill_s
from afd.messages.codec import MessageError, encode
from afd.messages.serving import PLACE_RANKS, worker_message_decoder
from tests.fakes.dispatch_scene import Scene, stats


def full(wait_s=0.5, interval_s=0.1, **fields):
    return stats(places_s=[wait_s + idx * interval_s for idx in range(8)], **fields)


def test_each_in_line_takes_the_next_place_wherever_it_is():
    assert predicted_wait_s([full()], 0) == pytest.approx(0.5)
    assert predicted_wait_s([full()], 5) == pytest.approx(1.0)
    assert predicted_wait_s([full(0.5), full(0.2)], 4) == pytest.approx(0.5)  # after 0.2, 0.3, 0.4 and one 0.5
    assert predicted_wait_s([full(), stats()], 5) == 0.0  # the other has room
    assert predicted_wait_s([full()], 5, at_least_s=2.0) == pytest.approx(2.0)
    assert predicted_wait_s([full()], 7 + 8) == pytest.approx(2.0)  # beyond what is told: at the same rate
    assert predicted_wait_s([stats()], 100) == 0.0  # a worker that says nothing promises nothing
    assert predicted_wait_s([], 3) == 0.0


def test_far_places_are_told_in_groups():
    told = [0.01 * rank for rank in PLACE_RANKS]
    assert predicted_wait_s([stats(places_s=told)], 3) == pytest.approx(0.03)
    for num_ahead in (40, 300, 511):
        assert predicted_wait_s([stats(places_s=told)], num_ahead) == pytest.approx(0.01 * num_ahead, rel=0.1)
        assert predicted_wait_s([stats(places_s=told)] * 2, 2 * num_ahead) == pytest.approx(0.01 * num_ahead, rel=0.1)
    assert predicted_wait_s([stats(places_s=told)], 5000) == pytest.approx(50.0, rel=0.05)
    # One worker tells of less: it goes on as it did.
    assert predicted_wait_s([stats(places_s=told), stats(places_s=told[:20])], 600) == pytest.approx(3.0, rel=0.1)


def test_more_places_than_there_are_ranks_are_no_message():
    encoded = encode(stats(places_s=[1.0] * (len(PLACE_RANKS) + 1)))
    with pytest.raises(MessageError):
        worker_message_decoder.decode(encoded)


def test_prefill_is_that_of_the_quickest_worker():
    assert prefill_s([full(prefill_token_s=1e-3), full(prefill_token_s=5e-4)], 200) == pytest.approx(0.1)
    assert prefill_s([stats()], 200) == prefill_s([], 200) == 0.0


def test_the_queue_tells_how_many_come_first():
    scene = Scene(enforce=True, ttft_s=60.0)
    scene.refuse("a", scene.submit(), 0.0, retry_after_s=5.0)
    for priority in (0, 1, 2):
        scene.submit(0.0, priority=priority)
    queue: AdmissionQueue = scene.dispatcher.queue
    assert len(queue) == 4
    assert [queue.num_ahead(priority) for priority in (-1, 0, 1, 2)] == [0, 2, 3, 4]
    assert queue.num_ahead(0, order=1) == 0
    assert queue.num_ahead(1, order=1) == 2


def test_the_line_in_front_counts():
    scene = Scene(enforce=True, ttft_s=2.0)
    first = scene.submit()
    scene.refuse("a", first, 0.0, retry_after_s=0.5)
    scene.say("a", full(0.5, 0.25), 0.01)
    waiting = []
    with pytest.raises(UnavailableError) as error:
        for _ in range(100):
            waiting.append(scene.submit(0.02))
    # 0.5 s, and 0.25 s for each in line, within 70 % of 2 s less 0.1 s.
    assert len(waiting) == 3
    assert error.value.code == "overloaded" and 1.0 < error.value.retry_after_s <= 2.0
    assert scene.dispatcher.counters.rejected_ttft == 1
    assert scene.submit(0.03, priority=-1) is not None  # who comes before them does not wait for them


def test_a_long_prompt_leaves_less_time_to_wait():
    scene = Scene(enforce=True, ttft_s=2.0)
    assert scene.submit(num_prompt=1500) is not None  # a place is free: waiting would not make it shorter
    scene.refuse("a", scene.submit(), 0.0, retry_after_s=0.5)
    scene.say("a", full(0.5, 0.1, prefill_token_s=1e-3), 0.0)
    assert scene.submit(num_prompt=100) is not None
    with pytest.raises(UnavailableError):
        scene.submit(num_prompt=1500)  # its prefill alone takes 1.5 s


def test_a_refusal_far_down_the_line_is_final_at_once():
    scene = Scene(enforce=True, ttft_s=1.0)
    scene.say("a", full(0.2, 0.3), 0.0)
    requests = [scene.submit() for _ in range(6)]  # all at once, before the worker answers any
    for request in requests:
        scene.refuse("a", request, 0.01, retry_after_s=0.2)
    ended = [request.sink.error is not None for request in requests]
    assert ended == [False] * 3 + [True] * 3
    assert requests[-1].sink.error.code == "overloaded"


def test_the_choices_of_one_request_wait_for_one_another():
    scene = Scene(enforce=True, ttft_s=1.0)
    scene.refuse("a", scene.submit(), 0.0, retry_after_s=0.1)
    scene.say("a", full(0.1, 0.2), 0.0)
    with pytest.raises(UnavailableError):
        scene.submit(count=4)
    assert scene.submit(count=2) is not None


def test_without_enforcement_nobody_is_turned_away_for_the_wait():
    scene = Scene(ttft_s=1.0)
    scene.say("a", full(50.0, 10.0), 0.0)
    assert scene.submit() is not None


@pytest.mark.parametrize("really", [0.3, 2.5])
def test_a_prediction_that_was_wrong_is_corrected(really):
    """Also where it is learnt long after it was made: nothing swings."""
    correction, expected = Correction(), []
    for idx in range(100):
        predicted_s = 2.0 + idx % 3
        expected.append(correction.apply(predicted_s) / predicted_s)
        if idx >= 20:
            correction.took(really * (2.0 + (idx - 20) % 3), 2.0 + (idx - 20) % 3)
    assert min(really, 1.0) - 0.05 <= min(expected) and max(expected) <= max(really, 1.0) + 0.05
    assert expected[-1] == pytest.approx(really, rel=0.1)


def test_a_cautious_correction_stays_above_most_of_what_things_take():
    rng, cautious, even = random.Random(0), Correction(0.9), Correction()
    longer = []
    for idx in range(2000):
        took_s = rng.uniform(0.5, 4.0)
        if idx > 100:
            longer.append((took_s > cautious.apply(1.0), took_s > even.apply(1.0)))
        cautious.took(took_s, 1.0)
        even.took(took_s, 1.0)
    shares = [sum(column) / len(longer) for column in zip(*longer, strict=True)]
    assert shares[0] < 0.3 < 0.4 < shares[1] < 0.6


def test_who_gives_up_its_place_in_line_corrects_the_forecast_too():
    """Else only those whose wait was short enough would be learnt from."""
    correction = Correction()
    for _ in range(30):
        correction.took_longer(8.0, 3.0)
    assert correction.apply(3.0) == pytest.approx(8.0, rel=0.1)
    correction.took_longer(2.0, 8.0)  # says nothing: it might have waited for eight seconds
    assert correction.apply(3.0) == pytest.approx(8.0, rel=0.1)


def test_a_line_that_ends_in_refusals_is_joined_by_fewer():
    """A worker that always says 'half a second' and never gives a place: soon newcomers are told at once."""
    scene, now, late, at_once = Scene(enforce=True, ttft_s=2.0), 0.0, 0, 0
    waiting = []
    for step in range(400):
        now = 0.05 * (step + 1)
        scene.say("a", full(0.5, 0.1), now)
        for request in list(waiting):
            if request.sink.error is not None:
                waiting.remove(request)
                late += 1
            elif request.req_id in scene.dispatcher.workers["a"].active:
                scene.refuse("a", request, now, retry_after_s=0.5)
        if step % 4 == 0:
            try:
                waiting.append(scene.submit(now))
            except UnavailableError:
                at_once += 1
        scene.alive(now)
    assert at_once > 2 * late, (late, at_once)


def test_who_was_let_into_the_line_stays_whatever_a_worker_believes_for_a_moment():
    scene = Scene(enforce=True, ttft_s=5.0)
    first, second = scene.submit(), scene.submit()
    for request in (first, second):
        scene.refuse("a", request, 0.01, retry_after_s=0.5)
    scene.alive(0.6)
    for request in (first, second):
        scene.refuse("a", request, 0.61, retry_after_s=30.0)
    assert first.sink.error is None and second.sink.error is None
    with pytest.raises(UnavailableError):
        scene.say("a", full(30.0, 5.0), 0.62)
        scene.submit(0.63)
