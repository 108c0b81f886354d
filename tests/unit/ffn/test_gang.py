"""Gangs by scripted scenarios (tests/sim has the simulation)."""

import pytest

from afd.ffn.gang import Arrival, GangTable, mask_of

LAYERS = 3


def arrival(rank, layer=0, *, at=0.0, gang=0, mask=0, stream=0, epoch=1, tokens=4):
    return Arrival(rank, stream, layer, epoch, gang, mask, tokens, at)


def ranks(batch):
    return None if batch is None else [a.rank for a in batch.arrivals]


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


def test_a_newcomer_is_parked_until_the_gangs_next_layer_zero_and_joins_there():
    gangs = table()
    gangs.arrive(arrival(0))
    first = gangs.next_batch(0.0)
    assert ranks(first) == [0] and first.mask == 0b1
    gangs.arrive(arrival(1, at=0.001))
    assert gangs.next_batch(0.002) is None, "the gang is under way: the newcomer waits"
    gangs.arrive(arrival(0, 1, at=0.002, gang=first.gang_id, mask=first.mask))
    assert ranks(gangs.next_batch(0.002)) == [0]
    gangs.arrive(arrival(0, at=0.003))
    joint = gangs.next_batch(0.003)
    assert ranks(joint) == [0, 1] and joint.mask == 0b11 and joint.gang_id != first.gang_id


def test_a_newcomer_loses_patience_after_one_predicted_step_and_runs_alone():
    gangs = table(max_window_s=0.005)
    gangs.arrive(arrival(0))
    gangs.next_batch(0.0)
    gangs.arrive(arrival(1, at=0.0))
    assert gangs.next_batch(0.004) is None
    assert gangs.deadline() == pytest.approx(0.005)
    alone = gangs.next_batch(0.005)
    assert ranks(alone) == [1] and alone.mask == 0b10
    gangs.arrive(arrival(1, 1, at=0.006, gang=alone.gang_id, mask=alone.mask))
    assert ranks(gangs.next_batch(0.006)) == [1], "its own gang waits for nobody else"


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


def test_members_get_a_window_at_layer_zero_and_the_late_one_is_left_out_for_a_step():
    gangs = table(max_window_s=0.005)
    form_pair(gangs)
    gangs.arrive(arrival(0, at=0.3))
    assert gangs.next_batch(0.304) is None
    batch = gangs.next_batch(0.3051)
    assert ranks(batch) == [0]
    gangs.arrive(arrival(1, at=0.306))
    assert gangs.next_batch(0.307) is None
    gangs.arrive(arrival(0, 1, at=0.31, gang=batch.gang_id, mask=batch.mask))
    assert ranks(gangs.next_batch(0.31)) == [0]
    gangs.arrive(arrival(0, at=0.32))
    assert ranks(gangs.next_batch(0.32)) == [0, 1]


def test_an_idle_member_is_not_waited_for():
    gangs = table()
    form_pair(gangs)
    gangs.idle(1, 0)
    gangs.arrive(arrival(0, at=0.3))
    assert ranks(gangs.next_batch(0.3)) == [0]


def test_a_stale_idle_notice_does_not_hide_a_pending_dispatch():
    gangs = table()
    gangs.arrive(arrival(0))
    gangs.idle(0, 0)
    assert ranks(gangs.next_batch(0.0)) == [0]


def test_a_lost_member_is_not_waited_for():
    gangs = table()
    pair = form_pair(gangs)
    gangs.arrive(arrival(0, 1, at=0.3, gang=pair.gang_id, mask=pair.mask))
    assert gangs.next_batch(0.3) is None
    gangs.lost(1)
    assert ranks(gangs.next_batch(0.3)) == [0]


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
