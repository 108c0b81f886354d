"""The posts of a shared-memory channel, and what a peer that writes anything into them brings about."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from stepmesh.transports.base import ChannelSpec
from stepmesh.transports.shm import ShmChannel, unsupported_reason

pytestmark = pytest.mark.skipif(unsupported_reason() is not None, reason=str(unsupported_reason()))

SLOT_BYTES = 4096
NUM_STREAMS = 2
NUM_SLOTS = 2 * NUM_STREAMS

Ends = tuple[ShmChannel, ShmChannel]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """Two channels, each with the other's memory and bell."""
    spec = ChannelSpec("test", NUM_STREAMS, SLOT_BYTES, SLOT_BYTES, b"")
    bells = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
    one, other = (ShmChannel(spec, bell, bell) for bell in bells)
    offers = [end.offer() for end in (one, other)]
    passed = [[os.dup(fd) for fd in offer.fds] for offer in offers]
    one.attach(offers[1].descriptor, passed[1])
    other.attach(offers[0].descriptor, passed[0])
    yield one, other
    one.close()
    other.close()
    for bell in bells:
        os.close(bell)


def write_words(writer: ShmChannel, words: dict[int, int]) -> None:
    assert writer._tx is not None
    for place, value in words.items():
        writer._tx.board_memory.cast("Q")[place] = value


def test_posts_arrive_in_the_order_in_which_they_were_made(ends: Ends) -> None:
    one, other = ends
    seqs = [0] * NUM_STREAMS
    for number in range(5 * NUM_SLOTS):  # around the ring, several times
        posted = []
        for stream in (1, 0)[: 1 + number % 2]:
            seqs[stream] += 1
            one.post(stream, seqs[stream] & 1, seqs[stream], SLOT_BYTES)
            posted.append((stream, seqs[stream] & 1, seqs[stream]))
        assert other.poll() == posted
        assert other.poll() == ()
    assert other.failure is None


def test_all_slots_may_be_posted_before_anybody_looks(ends: Ends) -> None:
    one, other = ends
    posts = [(stream, seq & 1, seq) for seq in (7, 8) for stream in range(NUM_STREAMS)]
    for post in posts:
        one.post(*post, SLOT_BYTES)
    assert other.poll() == posts


@pytest.mark.parametrize("bell", [NUM_SLOTS + 2, 2**64 - 1, 0])
def test_a_bell_that_cannot_be_is_a_failure_and_brings_nothing(ends: Ends, bell: int) -> None:
    one, other = ends
    one.post(0, 1, 1, SLOT_BYTES)
    other.poll()
    write_words(one, {0: bell})
    assert other.poll() == ()
    assert other.failure is not None and other.failure.rejected
    one.post(0, 0, 2, SLOT_BYTES)
    assert other.poll() == ()  # for good: the pair starts again


def test_a_post_into_no_slot_is_a_failure(ends: Ends) -> None:
    one, other = ends
    write_words(one, {8: NUM_SLOTS, 9: 1, 0: 1})
    assert other.poll() == ()
    assert other.failure is not None and "slot 4 of 4" in other.failure.reason


def test_a_closed_channel_posts_nothing(ends: Ends) -> None:
    one, other = ends
    one.close()
    one.post(0, 1, 1, SLOT_BYTES)
    assert other.poll() == ()
