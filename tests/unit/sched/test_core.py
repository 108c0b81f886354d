"""The worker's protocol, message by message, without a socket or a clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from afd.messages.membership import Plan
from afd.messages.serving import Abort, Lease, Refused, Resend, Submit, TokenChunk, Tokens, WorkerStats, lease_identity
from afd.sched.core import MAX_INTERRUPTIONS
from afd.sched.ledger import FINISHED_KEPT
from afd.types import FinishReason, SamplingParams
from tests.fakes.worker_core import GATEWAY, ScriptedWorker, attention, submit, view


@pytest.fixture
def worker() -> ScriptedWorker:
    return ScriptedWorker.make()


# -- tokens ---------------------------------------------------------------------------------------------------


def test_tokens_come_back_with_their_output_index(worker):
    worker.tell(submit())
    for _ in range(3):
        worker.step()
    assert [(c.first_idx, c.ids, c.finish) for c in worker.chunks()] == [
        (0, [5], None),
        (1, [5], None),
        (2, [5], FinishReason.LENGTH),
    ]


def test_what_was_committed_leaves_when_it_is_published_and_not_before(worker):
    worker.tell(submit())
    worker.begin()
    worker.commit()
    assert worker.core.has_news and worker.heard() == []
    worker.core.publish()
    assert not worker.core.has_news and len(worker.chunks()) == 1


def test_all_tokens_of_a_step_are_one_message_for_each_gateway():
    worker = ScriptedWorker.make(num_streams=2, num_blocks=32)
    for name, gateway in (("a", b"g1"), ("b", b"g1"), ("c", b"g2")):
        worker.tell(submit(name), gateway=gateway)
    worker.step()
    sent = {gateway: [c.req_id for c in message.chunks] for gateway, message in worker.core.take_outbox()}
    assert sent == {b"g1": ["a", "b"], b"g2": ["c"]}


def test_resend_from_the_gap_also_after_the_end(worker):
    worker.tell(submit())
    for _ in range(3):
        worker.step()
    worker.heard()
    worker.tell(Resend("r", 0, 1), Resend("r", 0, 1))
    assert worker.heard() == [Tokens([TokenChunk("r", 0, 1, [5, 5], finish=FinishReason.LENGTH)])]
    worker.tell(Resend("r", 7, 0), Resend("nobody", 0, 0))
    assert [(m.req_id, m.attempt, m.reason) for m in worker.refusals()] == [
        ("r", 7, "unknown"),
        ("nobody", 0, "unknown"),
    ]


def test_records_of_ended_requests_are_bounded(worker):
    for idx in range(FINISHED_KEPT + 50):
        worker.tell(submit(f"r{idx}", max_tokens=1))
        worker.step()
    worker.heard()
    worker.tell(Resend("r49", 0, 0), Resend("r50", 0, 0))
    [refused, tokens] = worker.heard()
    assert refused.req_id == "r49" and tokens.chunks[0].req_id == "r50"


# -- submissions ----------------------------------------------------------------------------------------------


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
        (submit("x" * 257), "invalid", "257 characters"),
    ],
)
def test_impossible_requests_are_refused_with_the_reason(worker, message, reason, detail):
    worker.tell(message)
    [refused] = worker.heard()
    assert isinstance(refused, Refused) and refused.reason == reason and detail in refused.detail
    assert worker.core.scheduler.idle


def test_refusals_by_state(worker):
    worker.core.set_ready(False, "waiting for the FFN workers", 0.0)
    worker.tell(submit())
    assert [(m.reason, m.detail) for m in worker.refusals()] == [("not_ready", "waiting for the FFN workers")]
    worker.core.set_ready(True, "", 0.0)
    for idx in range(3):
        worker.tell(submit(f"r{idx}"))
    worker.tell(submit("one too many"))
    assert [m.reason for m in worker.refusals()] == ["capacity"]
    worker.core.drain()
    worker.tell(submit())
    assert [m.reason for m in worker.refusals()] == ["draining"]
    for _ in range(3):
        worker.step()
    assert worker.core.scheduler.idle, "what was there before is finished"


def test_a_worker_that_never_was_ready_takes_nothing():
    worker = ScriptedWorker.make(ready=False)
    worker.tell(submit())
    assert [m.reason for m in worker.refusals()] == ["not_ready"]


def test_a_repeated_submit_is_ignored_and_a_newer_attempt_replaces(worker):
    worker.tell(submit(), submit())
    assert worker.core.scheduler.num_waiting == 1
    worker.tell(submit(attempt=1, output=[9]))
    worker.step()
    assert [(c.attempt, c.first_idx) for c in worker.chunks()] == [(1, 1)]
    worker.tell(submit(attempt=0))
    assert worker.core.scheduler.get("r").attempt == 1, "an old attempt must not replace a newer one"


def test_under_enforcement_a_full_worker_refuses_and_says_when_to_come_again():
    worker = ScriptedWorker.make(policy="enforce")
    worker.tell(submit("first", max_tokens=3))
    assert worker.core.scheduler.get("first").tpot_s == 0.05
    worker.step()
    tight = Submit("tight", 0, [1, 2], [], SamplingParams(max_tokens=3, seed=1), tpot_s=0.001)
    worker.tell(tight)
    [refused] = worker.refusals()
    assert (refused.req_id, refused.reason) == ("tight", "capacity")
    assert refused.retry_after_s > 1.0 and "tightest target here is 1 ms" in refused.detail
    assert worker.core.scheduler.get("tight") is None
    worker.tell(Submit("tight", 1, [1, 2], [], SamplingParams(max_tokens=3, seed=1), tpot_s=0.001))
    assert worker.core.scheduler.get("tight").tpot_s == 0.001  # it ran elsewhere: it is not new


def test_a_request_that_is_impossible_does_not_reach_admission():
    worker = ScriptedWorker.make(policy="enforce")
    worker.tell(submit(prompt=[100]))
    admission = worker.core.admission
    assert (admission.num_admitted, admission.num_refused) == (0, 0)


# -- aborts and leases ----------------------------------------------------------------------------------------


def test_abort_and_lists_of_live_requests_free_everything(worker):
    worker.tell(submit("a"), submit("b"), submit("c"), Abort(["a", "unknown"]))
    assert worker.core.scheduler.get("a") is None
    worker.tell(Lease("gw", 3.0, ["b"]))
    assert [seq.req_id for seq in worker.core.scheduler.sequences()] == ["b"]
    worker.tell(Resend("a", 0, 0))
    assert [m.reason for m in worker.refusals()] == ["unknown"], "an aborted request is forgotten"


def test_an_aborted_request_in_flight_brings_no_token(worker):
    worker.tell(submit())
    worker.begin()
    worker.tell(Abort(["r"]))
    worker.commit()
    worker.core.publish()
    assert worker.heard() == []
    worker.core.scheduler.check()


def test_time_in_which_this_process_stood_still_is_nobodys_silence(worker):
    worker.core.tick(0.0)
    worker.tell(Lease("gw", 3.0), submit())
    worker.core.tick(20.0)
    assert not worker.core.scheduler.idle
    for tenths in range(201, 232):
        worker.core.tick(tenths / 10)
    assert worker.core.scheduler.idle


def test_leases_over_a_connection_of_their_own_keep_the_gateways_requests(worker):
    """The one with the requests is quiet: its event loop is busy, or its submissions queue up here."""
    worker.core.tick(0.0)
    worker.tell(submit("a"))
    worker.now = 4.0
    worker.tell(Lease("gw", 3.0), gateway=lease_identity("gw"))
    for tenths in range(1, 70):
        worker.core.tick(tenths / 10)
    assert not worker.core.scheduler.idle and worker.listeners() == {GATEWAY}
    worker.core.tick(7.1)
    worker.now = 7.1
    assert worker.core.scheduler.idle and worker.listeners() == set()


@pytest.mark.parametrize("ttl_s", [float("nan"), float("inf"), 1e300, -1e300])
def test_a_lease_ends_whatever_was_asked_for(worker, ttl_s):
    worker.core.tick(0.0)
    worker.tell(Lease("gw", ttl_s))
    for halves in range(1, 121):
        worker.core.tick(halves / 2)
    worker.now = 60.5
    worker.core.tick(worker.now)
    assert worker.listeners() == set()


# -- FFN workers out of reach ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("others", "retryable"),
    [
        ([], False),
        ([attention(1)], True),
        ([attention(1, ready=False)], False),
        ([attention(1, draining=True), attention(2, ready=False)], False),
        ([attention(1, draining=True), attention(2)], True),
    ],
)
def test_requests_may_go_on_at_another_worker_where_one_serves(worker, others, retryable):
    worker.core.adopt(view(attention(0), *others))
    worker.tell(Lease("gw", 60.0), submit())
    worker.step()
    worker.heard()
    worker.core.set_ready(False, "ffn/0 is lost", 0.0)
    worker.core.tick(10.0)
    assert [(c.finish, c.retryable) for c in worker.chunks()] == [(FinishReason.ERROR, retryable)]
    worker.tell(Resend("r", 0, 0))
    assert [(c.ids, c.finish, c.retryable) for c in worker.chunks()] == [([5], FinishReason.ERROR, retryable)]


def test_tokens_that_were_not_published_yet_leave_before_the_error(worker):
    worker.tell(Lease("gw", 60.0), submit())
    worker.begin()
    worker.commit()
    worker.core.set_ready(False, "ffn/0 is lost", 0.0)
    worker.core.tick(10.0)
    assert [(c.first_idx, c.ids, c.finish) for c in worker.chunks()] == [(0, [5], None), (1, [], FinishReason.ERROR)]


# -- steps that are lost again and again -----------------------------------------------------------------------


def fail_whenever(worker: ScriptedWorker, *poison: str) -> list[TokenChunk]:
    """Serve all requests; whatever is in flight is lost as soon as a step of these is -> all chunks."""
    chunks = []
    for _ in range(500):
        if worker.core.scheduler.idle:
            return chunks
        worker.begin()
        flying = {item.seq.req_id for batch in worker.in_flight.values() for item in batch.items}
        if flying & set(poison):
            worker.fail("ffn/0 is lost: rejected a frame")
        else:
            worker.commit(min(worker.in_flight))
        worker.core.publish()
        chunks += worker.chunks()
        worker.core.scheduler.check()
    raise AssertionError("requests did not end")


@hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
@given(
    num_streams=st.integers(1, 4),
    requests=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6), st.booleans()), min_size=1, max_size=8),
    num_blocks=st.sampled_from([10, 24, 64]),
)
def test_only_steps_with_a_guilty_request_end(num_streams, requests, num_blocks):
    """Whatever their number, sizes and places; also where blocks are scarce, so that requests are preempted."""
    worker = ScriptedWorker.make(num_streams=num_streams, num_blocks=num_blocks, max_waiting=8)
    poison = [f"r{idx}" for idx, (_, _, bad) in enumerate(requests) if bad]
    for idx, (num_prompt, num_output, _) in enumerate(requests):
        worker.tell(submit(f"r{idx}", prompt=[1] * num_prompt, max_tokens=num_output))
    chunks = fail_whenever(worker, *poison)
    errors = {chunk.req_id for chunk in chunks if chunk.finish is FinishReason.ERROR}
    assert set(poison) <= errors
    assert errors == set(poison)


@pytest.mark.parametrize("poisoned", [0, 1, 2])
@pytest.mark.parametrize("num_streams", [1, 2])
def test_of_workers_that_share_an_ffn_worker_only_the_guilty_request_ends(poisoned, num_streams):
    """An FFN worker takes the steps of all with it; each tries its suspects while the others do not."""
    workers = [ScriptedWorker.make(num_streams=num_streams, num_blocks=64, rank=rank) for rank in range(3)]
    everybody = view(*(attention(rank) for rank in range(3)))
    chunks = [[] for _ in workers]
    for rank, worker in enumerate(workers):
        worker.core.adopt(everybody)
        for idx in range(3):
            worker.tell(submit("bad" if (rank, idx) == (poisoned, 1) else f"r{idx}", max_tokens=4))
    num_crashes = 0
    for turn in range(2000):
        now = 0.01 * turn
        for worker in workers:
            worker.now = now
            worker.core.tick(now)
            worker.begin()
        flying = [item.seq.req_id for w in workers for batch in w.in_flight.values() for item in batch.items]
        crash = "bad" in flying
        num_crashes += crash
        for rank, worker in enumerate(workers):
            if crash:
                worker.fail("ffn/0 is lost")
                worker.core.set_ready(False, "ffn/0 is lost", now)
                worker.core.set_ready(True, "", now)
            else:
                for stream in list(worker.in_flight):
                    worker.commit(stream)
            worker.core.publish()
            chunks[rank] += worker.chunks()
    errors = [(rank, chunk.req_id) for rank, sent in enumerate(chunks) for chunk in sent if chunk.error]
    assert errors == [(poisoned, "bad")] and num_crashes == MAX_INTERRUPTIONS
    assert all(worker.core.scheduler.idle for worker in workers)


def test_losses_with_progress_between_them_end_nothing(worker):
    worker.tell(submit(max_tokens=20))
    for _ in range(20):
        for _ in range(2):
            worker.begin()
            worker.fail()
        worker.step()
    assert [chunk.finish for chunk in worker.chunks()] == [None] * 19 + [FinishReason.LENGTH]


def test_a_request_that_waits_is_not_charged_with_what_others_do():
    worker = ScriptedWorker.make(num_streams=1, num_blocks=5)
    worker.tell(submit("bad", prompt=[1] * 15), submit("waits", prompt=[1] * 15))
    chunks = fail_whenever(worker, "bad")
    assert {chunk.req_id: chunk.finish for chunk in chunks if chunk.finish is not None} == {
        "bad": FinishReason.ERROR,
        "waits": FinishReason.LENGTH,
    }


# -- integrity ------------------------------------------------------------------------------------------------


def test_a_lost_block_is_found_when_the_worker_is_idle_and_not_before(worker):
    worker.tell(Lease("gw", 60.0), submit())
    worker.step()
    worker.core.scheduler.pool.allocate(1)
    worker.core.tick(0.1)
    for _ in range(2):
        worker.step()
    assert worker.core.scheduler.idle
    with pytest.raises(AssertionError, match="reference counts"):
        worker.core.tick(0.2)


def test_the_books_are_checked_once_in_a_while(worker):
    worker.tell(submit(max_tokens=1))
    worker.step()
    worker.core.tick(0.1)
    worker.core.scheduler.pool.allocate(1)
    worker.core.tick(60.2)  # nothing has happened since
    worker.tell(submit(max_tokens=1))
    worker.step()
    with pytest.raises(AssertionError, match="reference counts"):
        worker.core.tick(60.2)


# -- reports and the plan -------------------------------------------------------------------------------------


def reports(worker: ScriptedWorker) -> list[WorkerStats]:
    worker.core.report(worker.now)
    return [message for message in worker.heard() if isinstance(message, WorkerStats)]


def test_the_load_is_told_when_it_changes_and_anyhow_after_a_while(worker):
    worker.tell(Lease("gw", 60.0))
    [stats] = reports(worker)
    assert (stats.num_waiting, stats.kv_blocks_total, stats.max_tokens, stats.draining) == (0, 8, 32, False)
    worker.now = 0.2
    assert reports(worker) == []
    worker.now = 0.5
    assert len(reports(worker)) == 1
    worker.tell(submit())
    worker.now = 0.55
    assert reports(worker) == [], "not at once again"
    worker.now = 0.6
    assert [stats.num_waiting for stats in reports(worker)] == [1]
    worker.now = 0.7
    worker.core.drain()
    assert [stats.draining for stats in reports(worker)] == [True]


def test_a_plan_bounds_the_tokens_of_a_step():
    worker = ScriptedWorker.make()
    worker.core.adopt(view(attention(0), plan=Plan(max_step_tokens=8)))
    worker.tell(submit(prompt=[1] * 20))
    worker.begin()
    assert worker.in_flight[0].num_tokens == 8


# -- whatever comes -------------------------------------------------------------------------------------------

NAMES = st.sampled_from("abcde")
ATTEMPTS = st.integers(0, 3)
EVENTS = st.one_of(
    st.builds(lambda name, attempt, n: submit(name, max_tokens=n, attempt=attempt), NAMES, ATTEMPTS, st.integers(0, 5)),
    st.builds(lambda name: Abort([name]), NAMES),
    st.builds(Resend, NAMES, ATTEMPTS, st.integers(0, 4)),
    st.builds(lambda names: Lease("gw", 3.0, names), st.one_of(st.none(), st.lists(NAMES, max_size=3))),
    st.sampled_from(["begin", "commit", "publish", "fail", "down", "up", "wait"]),
)


@hypothesis_settings(max_examples=200, deadline=None, derandomize=True)
@given(events=st.lists(EVENTS, max_size=60), num_streams=st.integers(1, 3))
def test_whatever_happens_each_attempt_gets_its_tokens_in_order_and_ends_once(events, num_streams):
    worker = ScriptedWorker.make(num_streams=num_streams, num_blocks=16)
    received: dict[tuple[str, int], list[int]] = {}
    ended: dict[tuple[str, int], FinishReason] = {}
    asked: dict[tuple[str, int], int] = {}

    def look() -> None:
        for message in worker.heard():
            for chunk in message.chunks if isinstance(message, Tokens) else ():
                key = (chunk.req_id, chunk.attempt)
                ids = received.setdefault(key, [])
                assert chunk.first_idx <= len(ids), "a gap although nothing was lost"
                assert key not in ended or chunk.finish is ended[key]
                del ids[chunk.first_idx :]
                ids.extend(chunk.ids)
                if chunk.finish is not None:
                    ended[key] = chunk.finish

    for event in events:
        if event == "begin":
            if worker.core.ready:
                worker.begin()
        elif event == "commit":
            for stream in list(worker.in_flight):
                worker.commit(stream)
        elif event == "publish":
            worker.core.publish()
        elif event == "fail":
            worker.fail()
        elif event in ("down", "up"):
            if event == "down":
                worker.fail()
            worker.core.set_ready(event == "up", "" if event == "up" else "lost", worker.now)
        elif event == "wait":
            worker.now += 4.0
            worker.core.tick(worker.now)
        else:
            worker.tell(event)
            for seq in worker.core.scheduler.sequences():
                asked[seq.req_id, seq.attempt] = seq.sampling.max_tokens
        look()
        worker.core.scheduler.check()
    worker.core.set_ready(True, "", worker.now)
    while not worker.core.scheduler.idle:
        worker.step()
    worker.core.publish()
    look()
    assert worker.core.scheduler.pool.num_free == 16
    for key, reason in ended.items():
        assert len(received[key]) == asked[key] or reason is FinishReason.ERROR
