"""Signs of life, with a clock that the test holds in its hand."""

from __future__ import annotations

import pytest

from stepmesh.config import MeshConfig
from stepmesh.errors import ProtocolError
from stepmesh.layout import PayloadLayout
from stepmesh.session import Draining, Ended, Idle, Session
from stepmesh.types import RankId, Role, WireDtype
from stepmesh.wire import ControlFrame, ControlKind, Heartbeat, encode_close, encode_heartbeat, encode_idle

CONFIG = MeshConfig(
    id=RankId(Role.FFN, 0),
    incarnation="x",
    secret=b"s" * 16,
    config_hash=b"h",
    layout=PayloadLayout(8, 1, 0, WireDtype.FP32, WireDtype.FP32),
    peer_timeout_s=1.0,
    stall_timeout_s=5.0,
    exchange_timeout_s=30.0,
)


def control(raw: bytes) -> ControlFrame:
    return ControlFrame(raw[0], raw[4:])


def beat(session: Session, now: float, counter: int, *, pending: bool = False) -> None:
    assert session.receive(control(encode_heartbeat(Heartbeat(counter, pending))), now) is None


def test_silence_ends_a_session() -> None:
    session = Session(CONFIG, 0.0)
    assert session.judge(1.0, oldest_sent_at=None) is None
    assert "no heartbeat for 1.50 s" in (session.judge(1.5, oldest_sent_at=None) or "")
    beat(session, 1.6, 1)
    assert session.judge(2.5, oldest_sent_at=None) is None


def test_any_frame_is_a_sign_of_life() -> None:
    session = Session(CONFIG, 0.0)
    session.receive(control(encode_idle(1, 4)), 0.9)
    assert session.judge(1.8, oldest_sent_at=None) is None


def run(session: Session, start: float, end: float, *, counter: int, pending: bool) -> None:
    """Heartbeats every 0.5 s with the same counter."""
    now = start
    while now <= end:
        beat(session, now, counter, pending=pending)
        now += 0.5


def test_a_standing_counter_matters_only_with_work_pending() -> None:
    session = Session(CONFIG, 0.0)
    run(session, 0.0, 20.0, counter=7, pending=False)
    assert session.judge(20.0, oldest_sent_at=None) is None
    run(session, 20.5, 24.5, counter=7, pending=True)
    assert session.judge(24.5, oldest_sent_at=None) is None  # 4.5 s since it was last seen without work
    run(session, 25.0, 25.5, counter=7, pending=True)
    assert "no progress of its main loop" in (session.judge(25.5, oldest_sent_at=None) or "")
    beat(session, 26.0, 8, pending=True)
    assert session.judge(26.0, oldest_sent_at=None) is None


def test_an_unanswered_dispatch_is_work_pending() -> None:
    session = Session(CONFIG, 0.0)
    run(session, 0.0, 20.0, counter=7, pending=False)
    assert session.judge(20.0, oldest_sent_at=19.9) is None  # sent just now: it has not had its chance
    run(session, 20.5, 25.5, counter=7, pending=False)
    assert session.judge(24.0, oldest_sent_at=19.9) is None
    assert "no progress" in (session.judge(25.5, oldest_sent_at=19.9) or "")


def test_a_busy_peer_that_never_answers_is_given_up() -> None:
    session = Session(CONFIG, 0.0)
    for tenth in range(400):
        beat(session, tenth / 10, tenth, pending=True)
    assert session.judge(29.9, oldest_sent_at=0.0) is None
    assert "no answer for 35.00 s" in (session.judge(35.0, oldest_sent_at=0.0) or "")


def test_notices() -> None:
    session = Session(CONFIG, 0.0)
    assert session.receive(control(encode_idle(3, 12)), 0.0) == Idle(3, 12)
    assert session.receive(ControlFrame(ControlKind.DRAIN, b""), 0.0) == Draining()
    assert session.draining
    assert session.receive(control(encode_close("bye", retryable=False)), 0.0) == Ended("bye", retryable=False)


@pytest.mark.parametrize(
    "frame",
    [
        ControlFrame(ControlKind.HELLO, bytes(70)),
        ControlFrame(ControlKind.READY, b""),
        ControlFrame(ControlKind.HEARTBEAT, b"short"),
        ControlFrame(ControlKind.CLOSE, b""),
        control(encode_idle(4, 0)),  # there are streams 0..3
    ],
)
def test_what_has_no_place_in_a_session_is_an_error(frame: ControlFrame) -> None:
    with pytest.raises(ProtocolError):
        Session(CONFIG, 0.0).receive(frame, 0.0)
