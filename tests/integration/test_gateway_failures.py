"""Workers that die, fall silent, refuse, forget or fail: what the client sees."""

import asyncio

from afd.messages.serving import Refused
from tests.fakes.async_test import async_test
from tests.fakes.gateway import events, gateway, text_of
from tests.fakes.text_model import text_model
from tests.fakes.worker import counting_tokens

MODEL = text_model()


def expected_text(prompt_ids, count):
    return MODEL.tokenizer.decode([counting_tokens(prompt_ids, idx) for idx in range(count)])


def error_of(stream):
    """The one error event, which must be the last before [DONE]."""
    (error,) = [event["error"] for event in stream if "error" in event]
    assert stream[-1] == {"error": error}
    assert set(error) == {"message", "type", "param", "code"}
    return error


def start(rig, *, count=1, stream=True, **fields):
    """Begin `count` requests without waiting for their answers."""
    fields = {"max_tokens": 8, **fields}
    return [asyncio.ensure_future(rig.complete([1, 2], stream=stream, **fields)) for _ in range(count)]


async def tokens_arrived(rig, count, worker=None):
    """Until the gateway holds so many tokens of its running sequences, of one worker's where one is given."""
    workers = [w for w in rig.service.dispatcher.workers.values() if worker is None or w.key == worker.incarnation]
    async with asyncio.timeout(10):
        while sum(len(sequence.output_ids) for worker in workers for sequence in worker.active.values()) < count:
            await asyncio.sleep(0.002)


async def nobody_serves(rig):
    """All workers have left, and the gateway knows it."""
    rig.publish([])
    await rig.wait_until(lambda: not rig.service.dispatcher.workers)


@async_test
async def test_a_lost_worker_without_a_successor_is_an_error_event():
    async with gateway(MODEL, recovery_timeout_s=0.2) as rig:
        rig.worker.hold()
        (request,) = start(rig)
        await rig.worker.wait_submits()
        rig.worker.allow(1)
        await tokens_arrived(rig, 1)
        rig.publish([])
        answer = await request
    assert answer.status_code == 200
    stream = events(answer.text)
    error = error_of(stream)
    assert error["code"] == "worker_lost"
    assert "attention worker 0" in error["message"]
    assert text_of(stream) == expected_text([1, 2], 1)


@async_test
async def test_a_lost_worker_before_the_first_token_is_a_503():
    async with gateway(MODEL, recovery_timeout_s=0.2) as rig:
        rig.worker.hold()
        requests = start(rig) + start(rig, stream=False)
        await rig.worker.wait_submits(2)
        rig.publish([])
        answers = await asyncio.gather(*requests)
    for answer in answers:
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "worker_lost"
        assert answer.headers["retry-after"] == "1"


@async_test
async def test_streams_go_on_at_another_worker():
    async with gateway(MODEL, num_workers=2) as rig:
        first, second = rig.workers
        first.hold()
        requests = start(rig, count=2, seed=5)
        await first.wait_submits()
        await second.wait_submits()
        first.allow(3)
        await tokens_arrived(rig, 3, first)
        rig.publish([second])
        streams = [events((await request).text) for request in requests]
        assert rig.service.dispatcher.counters.migrated == 1
        (original,), moved = first.submits(), second.submits()[-1]
    assert (moved.req_id, moved.attempt, moved.output_ids) == (
        original.req_id,
        1,
        [counting_tokens([1, 2], idx) for idx in range(3)],
    )
    assert moved.sampling == original.sampling
    for stream in streams:
        assert not any("error" in event for event in stream)
        assert text_of(stream) == expected_text([1, 2], 8)


@async_test
async def test_a_silent_worker_is_given_up_after_the_time_that_is_configured():
    async with gateway(MODEL, num_workers=2, stall_timeout_s=1.0) as rig:
        first, second = rig.workers
        first.hold()
        requests = start(rig, count=2)
        await first.wait_submits()
        first.mute = True
        async with asyncio.timeout(4):
            streams = [events((await request).text) for request in requests]
        assert second.submits()[-1].attempt == 1
    assert [text_of(stream) for stream in streams] == [expected_text([1, 2], 8)] * 2


@async_test
async def test_the_only_worker_silent_is_waited_for():
    async with gateway(MODEL, stall_timeout_s=1.0) as rig:
        rig.worker.hold()
        (request,) = start(rig)
        await rig.worker.wait_submits()
        rig.worker.allow(1)
        await tokens_arrived(rig, 1)
        rig.worker.mute = True
        await rig.wait_until(lambda: not any(w.serving for w in rig.service.dispatcher.workers.values()))
        assert (await rig.client.get("/readyz")).status_code == 200  # who comes now waits, too
        (late,) = start(rig)
        await asyncio.sleep(0)
        rig.worker.mute = False
        rig.worker.run_freely()
        async with asyncio.timeout(20):
            streams = [events((await one).text) for one in (request, late)]
    assert [text_of(stream) for stream in streams] == [expected_text([1, 2], 8)] * 2


@async_test
async def test_who_comes_while_nobody_serves_gets_503_only_when_nobody_has_for_long():
    async with gateway(MODEL, recovery_timeout_s=0.3) as rig:
        await nobody_serves(rig)
        answer = await rig.complete([1])
        later = await rig.complete([1])
        ready = await rig.client.get("/readyz")
    assert [one.status_code for one in (answer, later, ready)] == [503, 503, 503]
    assert later.json()["error"]["code"] == ready.json()["error"]["code"] == "not_ready"
    assert "0 of 1 attention workers" in later.json()["error"]["message"]


@async_test
async def test_with_a_ttft_target_who_comes_while_nobody_serves_waits_no_longer_than_that():
    async with gateway(MODEL, sla={"policy": "enforce", "ttft_ms": 300.0}) as rig:
        await nobody_serves(rig)
        answer = await rig.complete([1])
        assert rig.service.unready_reason() is None
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "overloaded" and int(answer.headers["retry-after"]) >= 1


@async_test
async def test_a_successor_serves_those_who_came_in_between():
    async with gateway(MODEL, num_workers=2) as rig:
        second = rig.workers[1]
        await nobody_serves(rig)
        requests = start(rig, count=3)
        await rig.wait_until(lambda: len(rig.service.dispatcher.queue) == 3)
        rig.publish([second])
        streams = [events((await request).text) for request in requests]
    assert [text_of(stream) for stream in streams] == [expected_text([1, 2], 8)] * 3


@async_test
async def test_the_coordinator_lost_running_streams_finish_and_new_requests_are_served():
    async with gateway(MODEL) as rig:
        rig.worker.hold()
        (request,) = start(rig)
        await rig.worker.wait_submits()
        rig.membership.coordinator_alive = False
        rig.worker.run_freely()
        assert (await rig.complete([1])).status_code == 200
        assert (await rig.client.get("/readyz")).status_code == 200
        assert text_of(events((await request).text)) == expected_text([1, 2], 8)


@async_test
async def test_a_retryable_failure_moves_a_final_one_is_told():
    async with gateway(MODEL, num_workers=2) as rig:
        first, second = rig.workers
        first.fail_at = (2, "lost an FFN worker", True)
        moved = await rig.complete([1, 2], max_tokens=6)
        first.fail_at = second.fail_at = (2, "NaN in layer 3", False)
        told = await rig.complete([1, 2], max_tokens=6)
        (request,) = start(rig)
        stream = events((await request).text)
    assert moved.json()["choices"][0]["text"] == expected_text([1, 2], 6)
    assert told.status_code == 500
    assert "NaN in layer 3" in told.json()["error"]["message"]
    assert "NaN in layer 3" in error_of(stream)["message"]


@async_test
async def test_lost_token_messages_are_asked_for_again():
    async with gateway(MODEL) as rig:
        lost = {1, 4}
        rig.worker.drop = lambda chunk: (
            len(chunk.ids) == 1 and chunk.first_idx in lost and not lost.discard(chunk.first_idx)
        )
        answer = await rig.complete([1, 2], max_tokens=8)
        assert rig.service.dispatcher.counters.gaps >= 1
    assert lost == set()
    assert answer.json()["choices"][0]["text"] == expected_text([1, 2], 8)


@async_test
async def test_refused_here_taken_there():
    async with gateway(MODEL, num_workers=2) as rig:
        first, second = rig.workers
        first.refuse = lambda submit: Refused(submit.req_id, submit.attempt, "capacity", "KV is full", 0.5)
        answer = await rig.complete([1, 2], max_tokens=4)
        assert len(first.submits()) == len(second.submits()) == 1
    assert answer.json()["choices"][0]["text"] == expected_text([1, 2], 4)


@async_test
async def test_refused_everywhere_it_waits_for_its_turn():
    async with gateway(MODEL) as rig:
        refusals = 3

        def refuse(submit):
            nonlocal refusals
            refusals -= 1
            return Refused(submit.req_id, submit.attempt, "capacity", "busy", 0.05) if refusals >= 0 else None

        rig.worker.refuse = refuse
        answer = await rig.complete([1, 2], max_tokens=4)
    assert answer.status_code == 200
    assert refusals == -1


@async_test
async def test_no_room_in_time_is_a_503_with_retry_after():
    async with gateway(MODEL, sla={"policy": "enforce", "ttft_ms": 1000.0}) as rig:
        rig.worker.refuse = lambda submit: Refused(submit.req_id, submit.attempt, "capacity", "busy", 3.2)
        answer = await rig.complete([1, 2], max_tokens=4, stream=True)
        assert rig.service.num_requests_running == 0
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "4"
    assert answer.json()["error"]["code"] == "overloaded"


@async_test
async def test_the_workers_own_check_is_a_400():
    async with gateway(MODEL) as rig:
        rig.worker.refuse = lambda submit: Refused(submit.req_id, submit.attempt, "invalid", "longer than the KV cache")
        answer = await rig.complete([1, 2], max_tokens=4)
    assert answer.status_code == 400
    assert "KV cache" in answer.json()["error"]["message"]


@async_test
async def test_a_full_queue_is_a_503():
    async with gateway(MODEL, limits={"max_queue": 2}) as rig:
        rig.worker.refuse = lambda submit: Refused(submit.req_id, submit.attempt, "capacity", "busy", 30.0)
        waiting = start(rig, count=2, stream=False)
        await rig.worker.wait_submits(2)
        async with asyncio.timeout(10):
            while len(rig.service.dispatcher.queue) < 2:
                await asyncio.sleep(0.002)
        answer = await rig.complete([1, 2])
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "queue_full"
        rig.worker.refuse = lambda submit: None
        assert [(await request).status_code for request in waiting] == [200, 200]


@async_test
async def test_what_a_full_queue_refuses_is_not_even_read():
    """But where its priority may stand in it: it could be let in before others."""
    async with gateway(MODEL, limits={"max_queue": 1}) as rig:
        rig.worker.refuse = lambda submit: Refused(submit.req_id, submit.attempt, "capacity", "busy", 30.0)
        (waiting,) = start(rig, stream=False)
        await rig.worker.wait_submits(1)
        await rig.wait_until(lambda: len(rig.service.dispatcher.queue) == 1)
        assert (await rig.complete([1, 2], temperature="hot")).status_code == 503
        assert (await rig.chat("hi", temperature="hot")).status_code == 503
        assert (await rig.complete([1, 2], temperature="hot", priority=-1)).status_code == 400
        tokens = await rig.client.post("/tokenize", json={"prompt": "hi"})
        assert tokens.status_code == 200  # it needs no worker
        rig.worker.refuse = lambda submit: None
        assert (await waiting).status_code == 200


@async_test
async def test_one_failed_choice_ends_its_siblings():
    async with gateway(MODEL, num_workers=2) as rig:
        first, second = rig.workers
        second.hold()
        first.fail_at = (1, "broken", False)
        answer = await rig.complete([1, 2], n=2, max_tokens=4)
        await second.wait_until(lambda: bool(second.aborted))
        assert second.num_running == 0
    assert answer.status_code == 500


@async_test
async def test_a_request_that_takes_too_long_is_a_504():
    async with gateway(MODEL, limits={"request_timeout_s": 0.3}) as rig:
        rig.worker.hold()
        requests = start(rig, stream=False) + start(rig)
        await rig.worker.wait_submits(2)
        rig.worker.allow(1)  # the first to ask gets a token; it must not matter
        answers = await asyncio.gather(*requests)
        await rig.worker.wait_until(lambda: len(rig.worker.aborted) == 2)
    assert answers[0].status_code == 504
    assert answers[0].json()["error"]["code"] == "timeout"


@async_test
async def test_silence_is_filled_with_comments():
    async with gateway(MODEL, limits={"sse_keepalive_s": 0.1}) as rig:
        rig.worker.hold()
        (request,) = start(rig)
        await rig.worker.wait_submits()
        async with asyncio.timeout(10):
            (generation,) = rig.service._generations
            begun = generation.read_at
            while generation.read_at == begun:
                await asyncio.sleep(0.01)
        rig.worker.run_freely()
        answer = await request
    assert answer.text.startswith(": keep-alive\n\n")
    assert text_of(events(answer.text)) == expected_text([1, 2], 8)


@async_test
async def test_draining_finishes_what_runs_and_refuses_the_rest():
    async with gateway(MODEL) as rig:
        rig.worker.hold()
        (request,) = start(rig)
        await rig.worker.wait_submits()
        draining = asyncio.ensure_future(rig.service.drain(10))
        await rig.membership.wait_ready(False)
        refused = await rig.complete([1])
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutdown")
        rig.worker.run_freely()
        assert text_of(events((await request).text)) == expected_text([1, 2], 8)
        await draining


@async_test
async def test_draining_ends_what_does_not_finish():
    async with gateway(MODEL) as rig:
        rig.worker.hold()
        (request,) = start(rig)
        await rig.worker.wait_submits()
        rig.worker.allow(1)
        await tokens_arrived(rig, 1)
        await rig.service.drain(0.1)
        stream = events((await request).text)
        await rig.worker.wait_until(lambda: bool(rig.worker.aborted))
    assert error_of(stream)["code"] == "shutdown"
