"""bench/storm/account.py and gateway_log.py: who was concerned, what counts as a pause, and where an end is counted."""

from __future__ import annotations

import pytest

from bench.storm.account import Happened, Placement, Stream, account, table, undisturbed_gaps_s
from bench.storm.gateway_log import placements_of
from bench.storm.plan import Loss


def stream(name: str, *token_s: float, ended_s: float | None = None, **more) -> Stream:
    end_s = token_s[-1] if ended_s is None and token_s else (ended_s or 0.0)
    return Stream(
        0, more.pop("sent_s", token_s[0] - 0.1 if token_s else 0.0), name, list(token_s), ended_s=end_s, **more
    )


def happened(
    *targets: str, at_s: float = 10.0, until_s: float = 20.0, whole_s: float | None = 12.0, **loss
) -> Happened:
    return Happened(Loss(targets, **loss), at_s, until_s, whole_s)


def test_an_attention_worker_concerns_the_streams_that_it_runs_then():
    moved = [Placement(1.0, "moved", 1), Placement(5.0, "moved", 0), Placement(10.2, "moved", 1)]
    placements = [Placement(1.0, "own", 0), Placement(1.0, "other", 1), *moved]
    streams = [stream("own", 9.9, 11.5, 11.6), stream("other", 9.8, 10.1, 10.2, 14.0), stream("moved", 9.9, 10.9, 19.0)]
    [line] = account(streams, placements, [happened("attention/0")])
    assert line.num_concerned == 2
    assert line.pauses_s == pytest.approx([1.6, 8.1])
    assert line.gaps_s == pytest.approx([3.8])
    assert line.whole_s == pytest.approx([2.0])


@pytest.mark.parametrize(
    "targets, concerned", [(("ffn/1",), 2), (("coordinator",), 0), (("attention/1", "ffn/0"), 2), (("attention/7",), 0)]
)
def test_an_ffn_worker_concerns_all_a_coordinator_none(targets, concerned):
    streams = [stream("a", 9.0, 11.0), stream("b", 9.0, 11.0), stream("over", 8.0, 9.5), stream("new", 10.5, 11.0)]
    [line] = account(streams, [Placement(1.0, "a", 0)], [happened(*targets)])
    assert line.num_concerned == concerned == len(line.pauses_s) == 2 - len(line.gaps_s)


def test_a_pause_is_looked_for_until_the_next_loss_alone():
    streams = [stream("a", 9.9, 10.5, 19.9, 29.0), stream("b", 9.9, 14.0, 19.9, 20.1, 20.2, 29.0)]
    first, second = account(streams, [], [happened("ffn/0"), happened("coordinator", at_s=20.0, until_s=30.0)])
    assert first.pauses_s == pytest.approx([9.4, 5.9])
    assert second.gaps_s == pytest.approx([9.1, 8.8])


def test_a_stream_that_ended_in_an_error_paused_until_then():
    [line] = account([stream("a", 9.9, ended_s=14.0, error="gone")], [], [happened("ffn/0")])
    assert line.pauses_s == pytest.approx([4.1])
    assert (line.num_lost, line.num_refused) == (1, 0)


def test_every_end_is_counted_once_with_the_loss_before_it():
    events = [happened("ffn/0"), happened("coordinator", at_s=20.0, until_s=float("inf"))]
    streams = [
        stream("early", 1.0, 2.0, error="before the storm"),
        stream("late", 9.0, 10.0, 21.0, error="gone", num_wrong=3),
        stream("unplaced", sent_s=11.0, ended_s=25.0, error="nobody"),
        stream("refused", sent_s=11.0, ended_s=11.1, error="HTTP 503", refused=True),
    ]
    first, second = account(streams, [], events)
    assert (first.num_lost, first.num_refused, first.num_wrong) == (0, 1, 0)
    assert (second.num_lost, second.num_refused, second.num_wrong) == (2, 0, 3)


def test_first_tokens_of_what_waits_while_the_cluster_is_not_whole():
    streams = [stream("waits", 13.0, 14.0, sent_s=9.5), stream("new", 12.5, sent_s=11.0), stream("after", 15.0)]
    [line] = account(streams, [], [happened("ffn/0")])
    assert line.first_s == pytest.approx([3.5, 1.5])


def test_where_the_observer_stood_still_counts_count_and_times_do_not():
    streams = [stream("a", 9.9, 15.0, error="gone")]
    [line] = account(streams, [], [happened("ffn/0")], [(11.0, 13.0)])
    assert (line.num_lost, line.num_concerned, line.num_unmeasured) == (1, 1, 1)
    assert line.pauses_s == line.whole_s == []
    [line] = account(streams, [], [happened("ffn/0")], [(9.8, 9.95)])
    assert line.num_unmeasured == 1
    [line] = account(streams, [], [happened("ffn/0")], [(8.0, 9.9), (20.0, 21.0)])
    assert line.num_unmeasured == 0 and line.pauses_s


def test_not_whole_in_time_is_told_of_those_that_waited_for_it():
    events = [happened("ffn/0", whole_s=None), happened("ffn/0", whole_s=None, hasty=True)]
    patient, hasty = account([], [], events)
    assert (patient.num_unhealed, hasty.num_unhealed) == (1, 0)


def test_undisturbed_windows():
    streams = [stream("a", 0.0, 0.5, 3.9, 4.0, 8.0), stream("b", 5.0, 9.0)]
    assert undisturbed_gaps_s(streams, 0.0, 7.0, 3.0) == pytest.approx([2.5, 3.4])


def test_a_table_of_nothing_and_of_something():
    assert "undisturbed" in table([], [])
    lines = account([stream("a", 9.9, 11.5)], [], [happened("ffn/0")])
    row = table(lines, [0.1]).splitlines()[2].split("|")
    assert row[1].strip() == "ffn killed" and row[7].strip() == "1.60"
    assert len({line.count("|") for line in table(lines, [0.1]).splitlines()}) == 1


LOG = """\
23:59:59.500 D gateway/0    aa-1-0 goes to attention/1, attempt 0
23:59:59.501 D gateway/0    request one is aa-1-0
23:59:59.501 D gateway/0    aa-2-0 goes to attention/0, attempt 0
00:00:00.250 D gateway/0    aa-1-0 goes to attention/0, attempt 1
00:00:00.300 I attention/1  aa-1-0 goes to attention/3, attempt 1
loading step3-tiny: 0 of 5 ready
"""


def test_placements_from_a_log_that_passes_midnight():
    found = placements_of(LOG.splitlines(), midnight_s=-86000.0)
    assert found == [Placement(pytest.approx(399.5), "one", 1), Placement(pytest.approx(400.25), "one", 0)]
