"""Lines about processes that have ended, in whatever pieces they come."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from afd.cluster.endings import MAX_KEPT, Endings, ending_line

WORDS = st.lists(st.tuples(st.text(max_size=8), st.text(max_size=12)), max_size=6)


@given(WORDS, st.lists(st.integers(1, 40), max_size=20), st.integers(0, 20))
@settings(max_examples=50, derandomize=True, database=None)
def test_every_ending_is_told_once_and_in_order_whatever_the_pieces(words, sizes, listen_after) -> None:  # type: ignore[no-untyped-def]
    data = b"".join(ending_line(*word) for word in words)
    told: list[tuple[str, str]] = []
    endings = Endings()
    pieces, begin = [], 0
    for size in sizes:
        pieces.append(data[begin : begin + size])
        begin += size
    pieces.append(data[begin:])
    for idx, piece in enumerate(pieces):
        if idx == listen_after:
            endings.listen(lambda *word: told.append(word))
        endings.feed(piece)
    if listen_after >= len(pieces):
        endings.listen(lambda *word: told.append(word))
    assert told == words


def test_what_is_no_ending_is_dropped() -> None:
    told: list[tuple[str, str]] = []
    endings = Endings()
    endings.listen(lambda *word: told.append(word))
    endings.feed(b'nonsense\n[]\n{"ended": "a"}\n\xff\n' + ending_line("b", "exit code 1"))
    assert told == [("b", "exit code 1")]


def test_what_waits_for_a_listener_has_a_bound() -> None:
    told: list[tuple[str, str]] = []
    endings = Endings()
    for idx in range(MAX_KEPT + 5):
        endings.feed(ending_line(str(idx), ""))
    endings.listen(lambda *word: told.append(word))
    assert len(told) == MAX_KEPT
