"""A worker that computes for long is heard all the same; one that hangs is not."""

from __future__ import annotations

from contextlib import closing

import pytest

from afd.attention.report_repeater import ReportRepeater, is_due
from afd.messages.serving import Tokens, WorkerStats
from tests.unit.attention.test_gateway_link import GATEWAY, Conversation, submit

STATS = WorkerStats(rank=0, num_running=3, num_waiting=0, kv_blocks_total=10, kv_blocks_free=5)


@pytest.mark.parametrize(
    ("silent_s", "stalled_s", "due"),
    [(0.5, 0.5, False), (0.8, 0.8, True), (0.8, 5.0, True), (0.8, 5.1, False), (0.1, 3.0, False)],
)
def test_reports_are_repeated_while_a_stage_lasts_and_not_for_a_loop_that_hangs(silent_s, stalled_s, due):
    assert is_due(silent_s, stalled_s, patience_s=5.0) is due


def test_the_newest_report_goes_out_again_while_the_main_thread_does_nothing():
    talk = Conversation()
    try:
        talk.send(submit("a"))
        assert talk.received(1) == [submit("a")]
        with closing(ReportRepeater(talk.link, patience_s=60.0)):
            talk.link.send([(GATEWAY, STATS), (GATEWAY, Tokens([]))])
            assert [talk.heard() for _ in range(4)] == [STATS, Tokens([]), STATS, STATS]
        talk.send(submit("b"))
        assert talk.received(1) == [submit("b")]
    finally:
        talk.close()
