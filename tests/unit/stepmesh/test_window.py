"""The windows of both ends, alone and against one another."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepmesh.errors import FrameError, SlotBusyError, StaleArrivalError
from stepmesh.topology import PeerEpochs
from stepmesh.types import Header
from stepmesh.window import CombineWindow, DispatchWindow, Exchange

FIRST = PeerEpochs(1, 1, frozenset())


def header(seq: int, *, stream: int = 0, epoch: int = 1, step: int = 3, layer: int = 2, num_tokens: int = 5) -> Header:
    fields = dict.fromkeys(Header._fields, 0) | {
        "seq": seq,
        "stream": stream,
        "epoch": epoch,
        "step": step,
        "layer": layer,
        "num_tokens": num_tokens,
    }
    return Header(**fields)  # type: ignore[arg-type]


def exchange(seq: int) -> Exchange:
    return Exchange(seq, epoch=1, step=3, layer=2, num_tokens=5, sent_at=100.0 * seq)


def sent(*seqs: int) -> DispatchWindow:
    window = DispatchWindow(2)
    for seq in seqs:
        window.check_free(0, seq)
        window.sent(0, exchange(seq))
    return window


def test_a_parity_is_free_only_when_its_exchange_was_answered() -> None:
    window = sent(1, 2)
    with pytest.raises(SlotBusyError, match="seq 1 has no answer yet"):
        window.check_free(0, 3)
    window.check_free(1, 3)  # another stream has slots of its own
    assert window.accept(header(1)) is None  # superseded
    window.check_free(0, 3)
    with pytest.raises(SlotBusyError):
        window.check_free(0, 4)


def test_answers_are_cumulative() -> None:
    window = sent(1, 2)
    assert window.pending
    assert window.accept(header(2)) == exchange(2)
    assert not window.pending
    window.check_free(0, 3)
    window.check_free(0, 4)


def test_oldest_dispatch_without_an_answer() -> None:
    window = sent(1, 2)
    assert window.oldest_sent_at() == 100
    window.accept(header(1))
    assert window.oldest_sent_at() == 200
    window.accept(header(2))
    assert window.oldest_sent_at() is None


@pytest.mark.parametrize(
    ("combine", "problem"),
    [
        (header(3), "awaits no answer"),
        (header(1, stream=1), "awaits no answer"),
        (header(1, epoch=2), "epoch 2"),
        (header(1, step=4), "step 4 for a dispatch of step 3"),
        (header(1, layer=3), "layer 3 for a dispatch of layer 2"),
        (header(1, num_tokens=4), "4 rows for a dispatch of 5"),
    ],
)
def test_combines_that_fit_no_dispatch(combine: Header, problem: str) -> None:
    window = sent(1)
    with pytest.raises(FrameError, match=problem):
        window.accept(combine)
    assert window.pending


def test_a_combine_counts_once() -> None:
    window = sent(1)
    window.accept(header(1))
    with pytest.raises(FrameError):
        window.accept(header(1))


def test_dispatches_must_rise_per_stream() -> None:
    window = CombineWindow(2)
    assert window.accept(header(4), FIRST)
    for seq in (4, 3):
        with pytest.raises(FrameError, match="not above 4"):
            window.accept(header(seq), FIRST)
    assert window.accept(header(1, stream=1), FIRST)
    assert window.accept(header(9), FIRST)


def test_a_slot_is_filled_again_only_after_its_answer() -> None:
    window = CombineWindow(2)
    window.accept(header(1), FIRST)
    second = header(2)
    window.accept(second, FIRST)
    with pytest.raises(FrameError, match="seq 3 of stream 0 took the slot of 1, which has no answer yet"):
        window.accept(header(3), FIRST)
    window.accept(header(3, stream=1), FIRST)
    window.answered(second)  # settles 1, too
    assert window.accept(header(3), FIRST)


def test_epochs_of_a_stream() -> None:
    window = CombineWindow(1)
    assert window.accept(header(1, epoch=3), PeerEpochs(3, 4, frozenset()))
    assert not window.accept(header(2, epoch=5), PeerEpochs(3, 4, frozenset()))
    second = header(2, epoch=5)
    assert window.accept(second, PeerEpochs(4, 5, frozenset()))  # heard of in the meantime
    with pytest.raises(FrameError, match="already in 5"):
        window.accept(header(3, epoch=4), PeerEpochs(4, 5, frozenset()))
    window.answered(second)
    with pytest.raises(FrameError, match="epoch 6 is without this peer"):
        window.accept(header(3, epoch=6), PeerEpochs(5, 7, frozenset({6})))


def test_an_answer_settles_what_is_older() -> None:
    window = CombineWindow(1)
    first, second = header(1), header(2)
    for one in (first, second):
        window.accept(one, FIRST)
    window.check_answerable(first)
    window.answered(second)
    assert not window.pending
    for one in (first, second, header(3)):
        with pytest.raises(StaleArrivalError):
            window.check_answerable(one)


def test_an_answer_leaves_what_is_newer() -> None:
    window = CombineWindow(1)
    first, second = header(1), header(2)
    for one in (first, second):
        window.accept(one, FIRST)
    window.answered(first)
    window.check_answerable(second)
    with pytest.raises(StaleArrivalError):
        window.check_answerable(first)


def test_only_the_very_header_that_was_accepted_can_be_answered() -> None:
    window = CombineWindow(1)
    window.accept(header(1), FIRST)
    with pytest.raises(StaleArrivalError):
        window.check_answerable(header(1))


def test_idle_is_void_once_a_newer_dispatch_was_seen() -> None:
    window = CombineWindow(1)
    assert window.idle_is_current(0, 0)
    window.accept(header(7), FIRST)
    assert window.idle_is_current(0, 7)
    assert not window.idle_is_current(0, 6)


@given(st.lists(st.sampled_from(["send", "receive", "answer newest", "answer oldest", "deliver"]), max_size=80))
@settings(max_examples=200, derandomize=True, deadline=None)
def test_the_two_ends_never_use_a_slot_twice(actions: list[str]) -> None:
    """A perfect link between the two windows: no error ever, no slot written while it is in use, no loss."""
    ours, theirs = DispatchWindow(1), CombineWindow(1)
    seq = 0
    flying: list[int] = []  # dispatches on their way
    open_there: list[Header] = []  # delivered, not answered
    answers: list[int] = []  # combines on their way
    dispatch_slot: dict[int, int] = {}
    delivered = []
    for action in actions:
        if action == "send":
            try:
                ours.check_free(0, seq + 1)
            except SlotBusyError:
                continue
            seq += 1
            # Whoever had this slot before must not be read or answered any more.
            former = dispatch_slot.get(seq & 1)
            assert former not in flying and former not in [one.seq for one in open_there]
            dispatch_slot[seq & 1] = seq
            ours.sent(0, exchange(seq))
            flying.append(seq)
        elif action == "receive" and flying:
            received = header(flying.pop(0))
            assert theirs.accept(received, FIRST)
            open_there.append(received)
        elif action.startswith("answer") and open_there:
            answer = open_there[-1] if action == "answer newest" else open_there[0]
            theirs.check_answerable(answer)
            theirs.answered(answer)
            open_there = [other for other in open_there if other.seq > answer.seq]
            answers.append(answer.seq)
        elif action == "deliver" and answers:
            answered = ours.accept(header(answers.pop(0)))
            delivered += [answered.seq] if answered is not None else []
    assert delivered == sorted(set(delivered))
    if not flying and not open_there and not answers:
        assert not ours.pending
        assert not theirs.pending
