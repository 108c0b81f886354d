"""Stop strings: however the text is cut, the result is that of the obvious search over the whole."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.gateway.stop import StopMatcher


def naive(text, stops, include=False):
    """The obvious twin: grow the text by one character until one of the stop strings is at its end."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


def run(pieces, stops, include=False):
    matcher = StopMatcher(tuple(stops), include=include)
    shown = ""
    for piece in pieces:
        result = matcher.push(piece)
        shown += result.text
        if result.matched is not None:
            return shown, result.matched
    return shown + matcher.flush(), None


def cut(text, cuts):
    edges = sorted({0, len(text), *(c % (len(text) + 1) for c in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    text=st.text("ab\n", max_size=30),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 100), max_size=10),
    include=st.booleans(),
)
def test_any_cut_gives_the_naive_result(text, stops, cuts, include):
    assert run(cut(text, cuts), stops, include) == naive(text, stops, include)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    text=st.text("ab", max_size=20),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_no_more_is_held_back_than_could_still_match(text, stops):
    matcher = StopMatcher(tuple(stops))
    shown = ""
    for char in text:
        result = matcher.push(char)
        shown += result.text
        if result.matched is not None:
            return
        held = text[len(shown) : len(shown) + len(matcher._held)]
        assert not held or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["Hello wor", "ld"], ["world"], ("Hello ", "world")),
        (["a", "ab", "c"], ["abd"], ("aabc", None)),
        (["x\n", "\ny"], ["\n\n"], ("x", "\n\n")),
        (["aab"], ["ab", "b"], ("a", "ab")),
    ],
)
def test_examples(pieces, stops, expected):
    assert run(pieces, stops) == expected
