"""When a worker's next places come: as its sequences leave, no faster than newcomers are prefilled."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd.sched.places import places_s

SIZES = {"backlog_s": 0.0, "prefill_s": 0.1, "decode_s": 10.0, "allowed_s": 0.5}


def test_places_come_as_sequences_leave():
    assert places_s([3.0, 1.0, 2.0], num_free=0, first_s=0.0, count=3, **SIZES) == (1.0, 2.0, 3.0)


def test_free_places_are_taken_first_as_fast_as_prompts_are_computed():
    places = places_s([5.0], num_free=8, first_s=0.0, count=9, **SIZES)
    assert places[:6] == pytest.approx([0.0] * 6)  # half a second of prompts may wait
    assert places[6:8] == pytest.approx([0.1, 0.2])
    assert places[8] == 5.0


def test_what_still_has_to_be_computed_comes_first():
    places = places_s([], num_free=3, first_s=0.0, count=2, **(SIZES | {"backlog_s": 2.0}))
    assert places == pytest.approx([1.5, 1.6])


def test_newcomers_leave_too():
    places = places_s([1.0], num_free=0, first_s=0.0, count=3, **SIZES)
    assert places == pytest.approx([1.0, 1.0 + 0.1 + 10.0, 1.0 + 2 * 10.1])


def test_no_place_comes_before_the_first():
    assert places_s([1.0, 2.0], num_free=0, first_s=4.0, count=2, **SIZES) == pytest.approx([4.0, 4.0])


@given(
    st.lists(st.floats(0.0, 100.0), max_size=40),
    st.integers(0, 40),
    *[st.floats(0.0, 10.0)] * 5,
)
def test_places_are_in_order_and_none_is_given_twice(leaving, num_free, first, backlog, prefill, decode, allowed):
    places = places_s(
        leaving,
        num_free=num_free,
        first_s=first,
        backlog_s=backlog,
        prefill_s=prefill,
        decode_s=decode,
        allowed_s=allowed,
        count=32,
    )
    assert len(places) == 32
    assert list(places) == sorted(places) and places[0] >= first
    if not prefill and not backlog and (leaving or num_free):
        for idx, place in enumerate(places):  # as many have left by then as places were given beyond the free ones
            left = sum(leave <= place for leave in leaving) + sum(p + decode <= place for p in places[: idx + 1])
            assert idx < num_free + left
