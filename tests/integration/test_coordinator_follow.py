"""Members that follow the view over a call that stays open, over real gRPC."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from afd.membership.client import CoordinatorClient
from afd.membership.thread import MembershipTiming
from afd.messages.membership import ClusterView, RegisterRequest
from tests.integration.test_coordinator_service import (
    TOKEN,
    Joined,
    coordinator,
    info,
    joined_members,
)


@pytest.fixture
def join() -> Iterator[Callable[..., Joined]]:
    yield from joined_members()


SLOW_BEATS = MembershipTiming(heartbeat_s=60.0, alive_s=600.0, register_timeout_s=10.0, conflict_patience_s=1.5)


def test_a_change_reaches_members_without_waiting_for_their_heartbeat(join: Callable[..., Joined]) -> None:
    patient = {"coordinator.lost_after_s": 600.0, "coordinator.heartbeat_s": 60.0}
    with coordinator(**patient) as running:
        gateway = join(running.address, info("gateway"), timing=SLOW_BEATS)
        gateway.wait_view(lambda view: len(view.members) == 1)
        join(running.address, info("ffn"), timing=SLOW_BEATS)
        gateway.wait_view(lambda view: len(view.members) == 2)


def test_a_callback_that_fails_on_a_pushed_view_is_fatal_and_not_silent(join: Callable[..., Joined]) -> None:
    patient = {"coordinator.lost_after_s": 600.0, "coordinator.heartbeat_s": 60.0}
    with coordinator(**patient) as running:
        gateway = join(running.address, info("gateway"), timing=SLOW_BEATS)
        gateway.wait_rank()

        def look(view: ClusterView) -> None:
            if len(view.members) > 1:
                raise RuntimeError("a bug")

        gateway.membership.on_view(look)
        join(running.address, info("ffn"), timing=SLOW_BEATS)
        assert "a bug" in str(gateway.fatal.get(timeout=10.0))
        assert gateway.membership.lost


def test_a_member_whose_connections_close_is_lost_long_before_its_silence_counts(join: Callable[..., Joined]) -> None:
    with coordinator("2A1F", **{"coordinator.lost_after_s": 600.0}) as running:
        gateway = join(running.address, info("gateway"))
        gateway.wait_rank()
        dying = info("ffn")
        with ExitStack() as life:
            client = life.enter_context(CoordinatorClient(running.address, TOKEN))
            assert client.register(RegisterRequest(dying)).error == ""
            views = client.follow(dying.incarnation)
            assert dying.incarnation in {member.info.incarnation for member in next(views).members}
            both = gateway.wait_view(lambda view: len(view.members) == 2)
        gateway.wait_view(lambda view: view.version > both.version and len(view.members) == 1)
        with CoordinatorClient(running.address, TOKEN) as client:
            events = "\n".join(client.status().events)
        assert "ffn/0 lost: its connection closed" in events


def test_who_is_no_member_cannot_follow() -> None:
    with coordinator() as running, CoordinatorClient(running.address, TOKEN) as client:
        assert list(client.follow("nobody")) == []


def test_followers_of_a_coordinator_that_ends_are_let_go() -> None:
    with ExitStack() as life:
        with coordinator() as running:
            client = life.enter_context(CoordinatorClient(running.address, TOKEN))
            member = info("ffn")
            client.register(RegisterRequest(member))
            views = client.follow(member.incarnation)
            next(views)
        assert list(views) == []
