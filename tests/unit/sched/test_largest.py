"""The largest number that holds."""

from hypothesis import given
from hypothesis import strategies as st

from afd.sched.largest import largest


@given(st.integers(0, 300), st.integers(0, 400))
def test_it_is_the_last_that_holds(most, last):
    assert largest(most, lambda num: num <= last) == min(most, last)
