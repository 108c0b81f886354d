"""The newest view, handed from the membership's thread to the main loop."""

import itertools
import sys

import pytest

from afd.messages.membership import ClusterView, Member, Plan, WorkerInfo
from afd.worker import seat as seat_module
from afd.worker.seat import Seat


class Membership:
    """Gives views when a test says so."""

    def on_view(self, callback):
        self.show = callback

    def close(self):
        pass


def view(version, *incarnations):
    members = [
        Member(WorkerInfo("ffn", name, "host", 1, ""), rank) for rank, name in enumerate(incarnations or ["own"])
    ]
    return ClusterView("c", version, version, 1, 1, "m", "", "hybrid", Plan(), members)


@pytest.fixture
def seat():
    seat = Seat(Membership(), "own", "agreed")
    seat.follow()
    return seat


def test_the_newest_view_is_taken_once(seat):
    assert seat.new_view() is None
    for version in (1, 2):
        seat.membership.show(view(version))
    assert seat.new_view() == view(2)
    assert seat.new_view() is None


def test_views_from_before_the_worker_was_a_member_are_none_of_its_business(seat):
    """Its peers expect no dispatch of an epoch without it."""
    seat.membership.show(view(1, "other"))
    assert seat.new_view() is None
    seat.membership.show(view(2, "other", "own"))
    assert seat.new_view() == view(2, "other", "own")


def test_no_view_is_lost_wherever_the_main_loop_is_when_it_comes(seat):
    """The side thread delivers between any two instructions of the main thread's look."""
    for place in itertools.count():
        passed = itertools.count()

        def deliver(frame, event, arg, place=place, passed=passed):
            if frame.f_code.co_filename != seat_module.__file__:
                return None
            frame.f_trace_opcodes = True
            if event == "opcode" and next(passed) == place:
                sys.settrace(None)
                seat.membership.show(view(2))
            return deliver

        seat.membership.show(view(1))
        before = sys.gettrace()
        sys.settrace(deliver)
        try:
            first = seat.new_view()
        finally:
            sys.settrace(before)
        if next(passed) <= place:
            break  # the whole look was tried
        assert view(2) in (first, seat.new_view())
        assert seat.new_view() is None
    assert place > 3
