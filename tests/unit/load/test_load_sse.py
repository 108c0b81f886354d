"""SSE parser: equal to the specification's line loop, wherever the stream is cut."""

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from afd.load.sse import MAX_EVENT_BYTES, SseError, SseParser


def spec(stream: bytes) -> list[bytes]:
    """The obvious twin: WHATWG's algorithm, on the whole stream, one character and one line at a time."""
    lines, line, after_cr = [], b"", False
    for idx in range(len(stream)):
        char = stream[idx : idx + 1]
        if char == b"\n" and after_cr:
            after_cr = False
            continue
        after_cr = char == b"\r"
        if char in (b"\r", b"\n"):
            lines.append(line)
            line = b""
        else:
            line += char
    events, data = [], None
    for line in lines:
        if line == b"":
            if data is not None:
                events.append(b"\n".join(data))
            data = None
        elif not line.startswith(b":"):
            name, _, value = line.partition(b":")
            if name == b"data":
                data = [*(data or []), value.removeprefix(b" ")]
    return events


def feed_in_pieces(stream: bytes, cuts: list[int]) -> list[bytes]:
    parser = SseParser()
    edges = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    return [event for start, end in pairwise(edges) for event in parser.feed(stream[start:end])]


PIECES = st.sampled_from(
    [
        b"\n",
        b"\r",
        b"\r\n",
        b"\n\n",
        b"\r\n\r\n",
        b"data: {}",
        b"data:x",
        b"data",
        b"data: ",
        b": note",
        b"event: e",
        b"id",
    ]
)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.lists(PIECES | st.binary(max_size=4), max_size=24).map(b"".join), st.lists(st.integers(0, 1000), max_size=8))
@example(b"data: a\r\n\r\ndata: b\r\n\r\n", [8, 9, 10, 11])
@example(b"\n\n\ndata: a\n\n", [])
@example(b"data: a\r\r", [9])
def test_equals_the_specification_however_it_is_cut(stream, cuts):
    assert feed_in_pieces(stream, cuts) == spec(stream)


def test_every_single_cut_of_a_typical_stream():
    stream = b": hello\n\n" + b"".join(b'data: {"n": %d}\n\n' % n for n in range(5)) + b"data: [DONE]\n\n"
    expected = [b'{"n": %d}' % n for n in range(5)] + [b"[DONE]"]
    for cut in range(len(stream)):
        assert feed_in_pieces(stream, [cut]) == expected
    assert feed_in_pieces(stream, list(range(len(stream)))) == expected


def test_unfinished_event_is_none():
    assert SseParser().feed(b"data: a\n\ndata: b\n") == [b"a"]


def test_endless_event_is_refused():
    parser = SseParser()
    with pytest.raises(SseError, match=str(MAX_EVENT_BYTES)):
        for _ in range(MAX_EVENT_BYTES // 4096 + 2):
            parser.feed(b"x" * 4096)
