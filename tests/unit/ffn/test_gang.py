"""Gangs: single rules, and whatever comes. Stories stand in tests/scenarios/gangs, tests/sim has the simulation."""

import copy
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd.ffn import gang as gang_module
from afd.ffn.gang import Arrival, GangTable, mask_of

LAYERS = 3


def arrival(rank, layer=0, *, at=0.0, gang=0, mask=0, stream=0, epoch=1, tokens=4):
    return Arrival(rank, stream, layer, epoch, gang, mask, tokens, at)


def ranks(batch):
    return None if batch is None else [a.rank for a in batch.arrivals]


@pytest.mark.parametrize("look", ["has_pending", "under_way", "num_active_streams"])
def test_the_table_does_not_grow_under_a_look_of_the_heartbeat_thread(look):
    """Between any two lines of the look the main thread takes the first frame of one more stream."""
    gangs = GangTable(0, 1)
    fresh = iter(range(4))

    def interfere(frame, event, arg):
        if frame.f_code.co_filename != gang_module.__file__:
            return None
        if event == "line" and (stream := next(fresh, None)) is not None:
            sys.settrace(None)
            gangs.arrive(arrival(0, stream=stream))
            sys.settrace(interfere)
        return interfere

    before = sys.gettrace()
    sys.settrace(interfere)
    try:
        getattr(gangs, look)
    finally:
        sys.settrace(before)
    assert next(fresh, None) != 0, "nothing came during the look"
    assert getattr(gangs, look)


def table(**kwargs):
    return GangTable(0, 1, **kwargs)


def test_a_single_attention_worker_never_waits():
    gangs = table()
    for layer in range(LAYERS):
        gangs.arrive(arrival(0, layer, gang=9, mask=1))
        assert ranks(gangs.next_batch(0.0)) == [0]
    assert gangs.deadline() is None


def test_streams_are_active_from_the_first_dispatch_until_all_are_idle_or_lost():
    gangs = table()
    assert gangs.num_active_streams == 0
    gangs.arrive(arrival(0, stream=0))
    gangs.arrive(arrival(1, stream=0))
    gangs.arrive(arrival(0, stream=2))
    assert gangs.num_active_streams == 2
    while gangs.next_batch(1.0) is not None:
        pass
    assert gangs.num_active_streams == 2, "answered is not idle: the next layer is on its way"
    gangs.idle(0, 2)
    assert gangs.num_active_streams == 1
    gangs.idle(0, 0)
    assert gangs.num_active_streams == 1, "the other worker is still at work there"
    gangs.lost(1)
    assert gangs.num_active_streams == 0


def form_pair(gangs):
    """A gang of ranks 0 and 1 that has just been formed; its steps take 0.1 s."""
    for start in (0.0, 0.1, 0.2):
        for rank in (0, 1):
            gangs.arrive(arrival(rank, at=start))
        batch = gangs.next_batch(start + (0.1 if start == 0.0 else 0.0))
    assert ranks(batch) == [0, 1]
    return batch


def test_later_layers_wait_for_exactly_the_mask():
    gangs = table()
    pair = form_pair(gangs)
    gangs.arrive(arrival(1, 1, at=0.3, gang=pair.gang_id, mask=pair.mask))
    assert gangs.next_batch(0.3) is None
    gangs.arrive(arrival(0, 1, at=0.31, gang=pair.gang_id, mask=pair.mask))
    assert ranks(gangs.next_batch(0.31)) == [0, 1], "rank order, whatever the arrival order"


def test_a_stale_idle_notice_does_not_hide_a_pending_dispatch():
    gangs = table()
    gangs.arrive(arrival(0))
    gangs.idle(0, 0)
    assert ranks(gangs.next_batch(0.0)) == [0]


def test_a_straggler_is_detached_after_the_bound_and_rejoins_at_layer_zero():
    gangs = table(straggler_s=0.5)
    pair = form_pair(gangs)
    gangs.arrive(arrival(0, 1, at=0.3, gang=pair.gang_id, mask=pair.mask))
    assert gangs.deadline() == pytest.approx(0.8)
    assert ranks(gangs.next_batch(0.8)) == [0]
    assert gangs.num_stragglers == {1: 1}
    gangs.arrive(arrival(0, 2, at=0.81, gang=pair.gang_id, mask=pair.mask))
    assert ranks(gangs.next_batch(0.81)) == [0], "nobody waits for it twice"
    gangs.arrive(arrival(1, 1, at=0.9, gang=pair.gang_id, mask=pair.mask))
    assert ranks(gangs.next_batch(0.9)) == [1]
    gangs.arrive(arrival(1, at=1.0))
    gangs.arrive(arrival(0, at=1.0))
    assert ranks(gangs.next_batch(1.0)) == [0, 1]


def test_a_fresh_rank_serves_a_running_gang_from_its_mask():
    gangs = table()
    gangs.arrive(arrival(0, 2, gang=77, mask=0b11))
    gangs.arrive(arrival(1, 2, gang=77, mask=0b11))
    assert ranks(gangs.next_batch(0.0)) == [0, 1]


def test_a_rank_that_is_not_the_former_answers_layer_zero_at_once_and_names_no_gang():
    gangs = GangTable(1, 2)
    gangs.arrive(arrival(0))
    batch = gangs.next_batch(0.0)
    assert (ranks(batch), batch.gang_id, batch.mask) == ([0], 0, 0)


def test_complete_gangs_go_oldest_first():
    gangs = table()
    gangs.arrive(arrival(0, stream=1, at=0.2))
    gangs.arrive(arrival(0, stream=0, at=0.1))
    assert gangs.next_batch(0.3).stream == 0
    assert gangs.next_batch(0.3).stream == 1


def test_epochs_do_not_mix():
    gangs = table()
    pair = form_pair(gangs)
    gangs.arrive(arrival(0, 1, at=0.3, gang=pair.gang_id, mask=pair.mask, epoch=1))
    gangs.arrive(arrival(1, 1, at=0.3, gang=pair.gang_id, mask=pair.mask, epoch=2))
    assert gangs.next_batch(0.3) is None
    assert len(gangs.next_batch(0.9).arrivals) == 1


def test_mask_of_many_ranks():
    assert mask_of([0, 127]) == 1 | 1 << 127


# -- many newcomers, two epochs, losses -------------------------------------------------------------------------


def test_newcomers_that_lose_patience_together_run_together_beside_the_gang():
    gangs = table(max_window_s=0.005)
    gangs.arrive(arrival(0))
    main = gangs.next_batch(0.0)
    for rank, at in ((1, 0.001), (2, 0.003), (3, 0.004)):
        gangs.arrive(arrival(rank, at=at))
    assert gangs.next_batch(0.005) is None
    assert gangs.deadline() == pytest.approx(0.006)
    beside = gangs.next_batch(0.006)
    assert ranks(beside) == [1, 2, 3] and beside.mask == 0b1110
    gangs.arrive(arrival(0, 1, at=0.007, gang=main.gang_id, mask=main.mask))
    assert ranks(gangs.next_batch(0.007)) == [0], "the first gang goes on as it was"
    for rank in (1, 2, 3):
        gangs.arrive(arrival(rank, 1, at=0.008, gang=beside.gang_id, mask=beside.mask))
    assert ranks(gangs.next_batch(0.008)) == [1, 2, 3]
    for rank in (1, 2, 3):
        gangs.arrive(arrival(rank, at=0.009))
    assert gangs.next_batch(0.009) is None, "they are newcomers again"
    gangs.arrive(arrival(0, at=0.010))
    assert ranks(gangs.next_batch(0.010)) == [0, 1, 2, 3]


def test_patience_lasts_a_step_and_the_window_at_its_end():
    gangs = table(max_window_s=0.005)
    form_pair(gangs)  # at 0.2; a step takes 0.1
    gangs.arrive(arrival(2, at=0.201))
    assert gangs.deadline() == pytest.approx(0.306)
    assert gangs.next_batch(0.3059) is None
    assert ranks(gangs.next_batch(0.3061)) == [2]


def test_a_gang_is_of_one_epoch_and_nobody_waits_for_the_other_one():
    """A third worker joined: each member hears of the new epoch with its own next heartbeat."""
    gangs = table(max_window_s=0.005)
    form_pair(gangs)
    gangs.arrive(arrival(0, at=0.3, epoch=2))
    assert gangs.next_batch(0.3) is None, "within the window the other one may come"
    gangs.arrive(arrival(1, at=0.301, epoch=1))
    new = gangs.next_batch(0.301)
    assert ranks(new) == [0] and new.mask == 0b01 and new.gang_id >> 48 == 2, "everybody is here"
    old = gangs.next_batch(0.301)
    assert ranks(old) == [1] and old.mask == 0b10
    for rank, gang, epoch in ((0, new, 2), (1, old, 1)):
        gangs.arrive(arrival(rank, 1, at=0.31, gang=gang.gang_id, mask=gang.mask, epoch=epoch))
        assert ranks(gangs.next_batch(0.31)) == [rank]
    gangs.arrive(arrival(1, at=0.32, epoch=1))
    assert ranks(gangs.next_batch(0.32)) == [1], "an older epoch is served at once, beside the gang"
    gangs.arrive(arrival(1, at=0.33, epoch=2))
    assert gangs.next_batch(0.33) is None
    gangs.arrive(arrival(0, at=0.331, epoch=2))
    assert ranks(gangs.next_batch(0.331)) == [0, 1], "together again"


def test_nobody_waits_for_a_member_that_was_restarted():
    """Its successor has the same rank and begins in the new epoch; the old gang's mask still names it."""
    gangs = GangTable(1, 2)  # not the former: it learns of gangs by their members only
    for rank in (0, 1):
        gangs.arrive(arrival(rank))
        gangs.next_batch(0.0)
    gangs.lost(1)
    gangs.arrive(arrival(1, at=0.1, epoch=2))
    assert ranks(gangs.next_batch(0.1)) == [1]
    gangs.arrive(arrival(0, 1, at=0.1, gang=9, mask=0b11))
    assert ranks(gangs.next_batch(0.1)) == [0]


def test_members_that_leave_one_by_one_end_the_wait():
    gangs = table(max_window_s=0.005)
    for start in (0.0, 0.1, 0.2):
        for rank in range(4):
            gangs.arrive(arrival(rank, at=start))
        assert gangs.next_batch(start + 0.05) is not None
    gangs.arrive(arrival(0, at=0.3))
    gangs.idle(1, 0)
    gangs.lost(2)
    assert gangs.next_batch(0.3001) is None, "rank 3 may still come"
    gangs.idle(3, 0)
    assert ranks(gangs.next_batch(0.3002)) == [0]


def test_workers_half_a_step_apart_meet():
    """Two lone gangs in anti-phase: whoever comes to layer 0 in the middle of the other's step waits for its end."""
    gangs = table(max_window_s=0.005)
    gangs.arrive(arrival(0))
    first = gangs.next_batch(0.0)
    gangs.arrive(arrival(1, at=0.002))
    assert gangs.next_batch(0.002) is None
    for layer in (1, 2):
        gangs.arrive(arrival(0, layer, at=0.002 * layer, gang=first.gang_id, mask=first.mask))
        assert ranks(gangs.next_batch(0.002 * layer)) == [0]
    gangs.arrive(arrival(0, at=0.006))
    assert ranks(gangs.next_batch(0.006)) == [0, 1]


def test_streams_are_formed_by_different_ranks_and_do_not_wait_for_one_another():
    """3A2F: rank 0 forms streams 0 and 2, rank 1 stream 1; a stream whose member is late holds nobody else up."""
    tables = [GangTable(f, 2) for f in range(2)]
    formers = {}
    for f, gangs in enumerate(tables):
        for stream in range(3):
            for rank in range(3):
                gangs.arrive(arrival(rank, stream=stream, at=0.001 * stream))
        while (batch := gangs.next_batch(0.01)) is not None:
            assert ranks(batch) == [0, 1, 2]
            if batch.mask:
                formers[batch.stream] = f
    assert formers == {0: 0, 1: 1, 2: 0}
    gangs = tables[0]
    gangs.arrive(arrival(0, 1, stream=0, gang=5, mask=0b111, at=0.02))
    for rank in range(3):
        gangs.arrive(arrival(rank, 1, stream=2, gang=6, mask=0b111, at=0.03))
    assert gangs.next_batch(0.03).stream == 2


def test_a_new_plan_shortens_the_window():
    gangs = table(max_window_s=0.005)
    form_pair(gangs)
    gangs.limit_window(0.001)
    gangs.arrive(arrival(0, at=0.3))
    assert gangs.next_batch(0.3009) is None
    assert ranks(gangs.next_batch(0.3011)) == [0]


def test_a_sole_worker_can_have_its_next_gang_reserved():
    gangs = table()
    assert gangs.reserve(0, 0, 1) is None, "it has not been heard of yet"
    gangs.arrive(arrival(0))
    assert gangs.reserve(0, 0, 1) is None, "something is here already"
    first = gangs.next_batch(0.0)
    reserved = gangs.reserve(0, 0, 1)
    assert (reserved.rank, reserved.stream, reserved.epoch, reserved.mask) == (0, 0, 1, 1)
    gangs.form(reserved, 1.0)
    assert gangs.step_s(0) == 1.0
    gangs.arrive(arrival(0, 1, gang=reserved.id, mask=1, at=1.1))
    assert gangs.next_batch(1.1).gang_id == reserved.id, "its members echo it"
    assert gangs.reserve(0, 0, 2) is None, "another epoch may have other members"
    assert gangs.reserve(0, 1, 1) is None and gangs.reserve(1, 0, 1) is None
    unused = gangs.reserve(0, 0, 1)
    gangs.arrive(arrival(0, at=2.0))
    ids = {first.gang_id, reserved.id, unused.id, gangs.next_batch(2.0).gang_id}
    assert len(ids) == 4, "no two steps have the same gang, whether it was reserved for them or not"
    gangs.idle(0, 0)
    assert gangs.reserve(0, 0, 1) is None, "nothing is to be expected"


@pytest.mark.parametrize("other", [arrival(1), arrival(0, stream=1)])
def test_no_gang_is_reserved_while_anybody_else_is_at_work(other):
    gangs = table()
    for one in (arrival(0), other):
        gangs.arrive(one)
        while gangs.next_batch(1.0) is not None:
            pass
    assert gangs.reserve(0, 0, 1) is None
    gangs.lost(1)
    gangs.idle(0, 1)
    assert gangs.reserve(0, 0, 1) is not None


def test_only_a_streams_former_reserves_its_gangs():
    gangs = GangTable(1, 2)
    for stream in (0, 1):
        gangs.arrive(arrival(0, stream=stream))
        gangs.next_batch(0.0)
        assert (gangs.reserve(0, stream, 1) is not None) is (stream == 1)
        gangs.idle(0, stream)


@given(st.lists(st.tuples(st.sampled_from(("layer", "step", "idle", "lost", "take")), st.integers(0, 1)), max_size=30))
def test_a_reserved_gang_is_what_its_step_would_have_formed_whatever_came_earlier(script):
    gangs, now, gang = table(), 0.0, (0, 0)
    for event, rank in script:
        now += 0.001
        if event == "layer":
            gangs.arrive(arrival(rank, 1, at=now, gang=gang[0], mask=gang[1]))
        elif event == "step":
            gangs.arrive(arrival(rank, at=now))
        elif event == "idle":
            gangs.idle(rank, 0)
        elif event == "lost":
            gangs.lost(rank)
        elif (batch := gangs.next_batch(now)) is not None:
            gang = batch.gang_id, batch.mask
        twin = copy.deepcopy(gangs)
        if (reserved := gangs.reserve(0, 0, 1)) is not None:
            twin.arrive(arrival(0, at=now))
            batch = twin.next_batch(now)
            assert batch is not None and (batch.gang_id, batch.mask, ranks(batch)) == (reserved.id, reserved.mask, [0])
            gangs.form(reserved, now)
            assert what_follows(gangs, gang=reserved, now=now) == what_follows(twin, gang=reserved, now=now)


def what_follows(gangs, gang, now):
    """All that a table decides of a gang's next layer, a newcomer beside it, and the members' next step."""
    seen = [gangs.under_way, gangs.has_pending, gangs.num_active_streams, gangs.window_s(0), gangs.step_s(0)]
    gangs.arrive(arrival(0, 1, gang=gang.id, mask=gang.mask, at=now + 0.001))
    gangs.arrive(arrival(1, at=now + 0.001))
    for later, event in ((0.001, None), (0.002, arrival(0, at=now + 0.002)), (0.02, None), (9.0, None)):
        if event is not None:
            gangs.arrive(event)
        seen.append(gangs.deadline())
        while (batch := gangs.next_batch(now + later)) is not None:
            seen.append((batch.layer, batch.gang_id, batch.mask, ranks(batch)))
    return seen
