"""Connections fed by hand: the same bytes give the same record, wherever the network cuts them."""

import asyncio
import json

import pytest

from afd.errors import ConfigError
from afd.load.client import CompletionSettings, complete
from afd.load.http1 import MAX_HEAD_BYTES, Connection, ServerUrl
from afd.load.record import Outcome, RequestRecord
from tests.fakes.async_test import async_test
from tests.fakes.openai_server import chat_event, text_event, usage_event


class FakeTransport(asyncio.Transport):
    """Remembers what was written; closing is reported at the loop's next turn, as a socket's is."""

    def __init__(self, protocol):
        super().__init__()
        self.protocol = protocol
        self.written = b""
        self.aborted = False

    def write(self, data):
        self.written += data

    def is_closing(self):
        return self.aborted

    def abort(self):
        if not self.aborted:
            self.aborted = True
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)


class OneConnection:
    """Stands in for HttpClient: every request goes over the one fake connection."""

    def __init__(self):
        self.connection = Connection()
        self.transport = FakeTransport(self.connection)
        self.connection.connection_made(self.transport)

    async def post(self, path, body, sink):
        await self.connection.exchange(body, sink)


async def answer(*pieces, close=False, endpoint="completions", keep_texts=False):
    """The record of a request that gets these bytes, one read each."""
    client = OneConnection()
    record = RequestRecord(0, 3, texts=[] if keep_texts else None)
    settings = CompletionSettings("m", endpoint=endpoint, keep_texts=keep_texts)
    asking = asyncio.create_task(complete(client, settings, b"{}", record))
    await asyncio.sleep(0)
    for piece in pieces:
        client.connection.data_received(piece)
    if close:
        client.connection.connection_lost(None)
    await asking
    return record, client.connection


def event(value):
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def chunked(*blocks):
    return b"".join(b"%x\r\n%s\r\n" % (len(block), block) for block in blocks) + b"0\r\n\r\n"


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENTS = [
    event(text_event(" a")),
    event(text_event(" \u00e9", "length")),
    event(usage_event(7, 2, 4)),
    b"data: [DONE]\n\n",
]
STREAM = HEAD + chunked(*EVENTS)


def check_good(record):
    assert (record.outcome, record.error, record.status) == (Outcome.COMPLETED, "", 200)
    assert (record.num_prompt_tokens, record.num_output_tokens, record.num_cached_tokens) == (7, 2, 4)
    assert len(record.token_times) == 2
    assert record.start_s <= record.token_times[0] <= record.token_times[1] <= record.end_s


@async_test
async def test_every_single_cut():
    for cut in range(len(STREAM)):
        record, connection = await answer(STREAM[:cut], STREAM[cut:]) if cut else await answer(STREAM)
        check_good(record)
        assert connection.reusable


@async_test
async def test_byte_by_byte():
    record, _ = await answer(*(STREAM[idx : idx + 1] for idx in range(len(STREAM))), keep_texts=True)
    check_good(record)
    assert "".join(record.texts) == " a \u00e9"


@async_test
async def test_several_http_chunks_in_an_event_and_several_events_in_an_http_chunk():
    body = b"".join(EVENTS)
    record, _ = await answer(HEAD + chunked(body))
    check_good(record)
    record, _ = await answer(HEAD + chunked(*(body[idx : idx + 5] for idx in range(0, len(body), 5))))
    check_good(record)


@async_test
async def test_other_framings():
    body = b"".join(EVENTS)
    kind = b"Content-Type: text/event-stream\r\n"
    record, connection = await answer(b"HTTP/1.1 200 OK\r\n" + kind + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    check_good(record)
    assert connection.reusable
    record, connection = await answer(b"HTTP/1.0 200 OK\r\n" + kind + b"\r\n" + body, close=True)
    check_good(record)
    assert not connection.reusable
    record, connection = await answer(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + STREAM)
    check_good(record)
    record, connection = await answer(HEAD.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + chunked(body))
    check_good(record)
    assert not connection.reusable


@async_test
async def test_cut_off_anywhere_is_a_disconnect():
    for cut in range(0, len(STREAM) - 1, 7):
        record, connection = await answer(*([STREAM[:cut]] if cut else []), close=True)
        assert record.outcome is Outcome.DISCONNECTED
        assert ("before it answered" if cut == 0 else f"after {cut} bytes") in record.error
        assert not connection.reusable


@async_test
async def test_stream_without_an_end():
    record, _ = await answer(HEAD + chunked(*EVENTS[:1]))
    assert record.outcome is Outcome.DISCONNECTED
    assert "without a finish reason" in record.error
    assert record.num_output_tokens == 1
    record, _ = await answer(HEAD + chunked(*EVENTS[:2]))  # a finish reason will do: [DONE] is only a custom
    assert record.outcome is Outcome.COMPLETED


BIG_HEAD = b"HTTP/1.1 200 OK\r\n" + b"X-Big: %s\r\n" % (b"x" * 1000) * (MAX_HEAD_BYTES // 1000 + 1)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n", "does not speak HTTP"),
        (b"\x16\x03\x01\x02\x00\x01\x00", "does not speak HTTP"),
        (BIG_HEAD, "headers of more than"),
        (HEAD + b"zz\r\nnot a chunk size", "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{}", "application/json, not an event stream"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "no content type"),
        (b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n\x81", "upgrade"),
        (HEAD + chunked(b"data: {\n\n"), "no chunk of a completion"),
        (HEAD + chunked(b"data: \xff\xfe\n\n"), "no chunk of a completion"),
        (HEAD + chunked(b"data: [1]\n\n"), "no chunk of a completion"),
        (HEAD + chunked(b'data: {"choices": 3}\n\n'), "no chunk of a completion"),
        (HEAD + chunked(b'data: {"choices": [{"text": 3}]}\n\n'), "no chunk of a completion"),
        (HEAD + chunked(b'data: {"choices": [], "usage": {"completion_tokens": "x"}}\n\n'), "no chunk of a completion"),
        (STREAM + STREAM, "two responses"),
    ],
)
@async_test
async def test_garbage_is_a_protocol_error(data, reason):
    record, connection = await answer(data)
    assert record.outcome is Outcome.PROTOCOL_ERROR
    assert reason in record.error
    assert not connection.reusable


@async_test
async def test_bytes_that_nobody_asked_for_close_the_connection():
    record, connection = await answer(STREAM)
    check_good(record)
    connection.data_received(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
    assert not connection.reusable
    await connection.closed


@async_test
async def test_what_counts_as_a_token_in_chat():
    deltas = [
        chat_event({"role": "assistant", "content": ""}),  # opens
        chat_event({"reasoning_content": "hm"}),
        chat_event({"content": ""}),  # a token that ends inside a character
        chat_event({"content": "x"}),
        chat_event({"tool_calls": [{"index": 0}]}),
        chat_event({}, "stop"),  # closes
    ]
    record, _ = await answer(HEAD + chunked(*map(event, deltas), b"data: [DONE]\n\n"), endpoint="chat")
    assert record.outcome is Outcome.COMPLETED
    assert len(record.token_times) == record.num_output_tokens == 4


@async_test
async def test_token_ids_without_text_count():
    chunk = text_event("") | {"choices": [{"index": 0, "text": "", "token_ids": [5], "finish_reason": "length"}]}
    record, _ = await answer(HEAD + chunked(event(chunk), b"data: [DONE]\n\n"))
    assert record.num_output_tokens == 1


@async_test
async def test_a_lone_token_without_text_arrives_with_the_finish():
    record, _ = await answer(
        HEAD + chunked(event(text_event("", "stop")), event(usage_event(3, 1)), b"data: [DONE]\n\n")
    )
    assert record.outcome is Outcome.COMPLETED
    assert list(record.token_times) == [record.end_s]
    assert record.ttft_s == record.e2el_s


@async_test
async def test_an_end_token_arrives_with_the_finish_too():
    closing, usage = event(text_event("", "stop")), event(usage_event(3, 2))
    blocks = [chunked(block).removesuffix(b"0\r\n\r\n") for block in (event(text_event("a")), closing, usage)]
    record, _ = await answer(HEAD, *blocks, chunked(b"data: [DONE]\n\n"))
    assert record.outcome is Outcome.COMPLETED
    assert len(record.token_times) == record.num_output_tokens == 2
    assert record.token_times[0] < record.token_times[1] == record.end_s
    assert record.tpot_s > 0


@async_test
async def test_no_token_at_all():
    record, _ = await answer(
        HEAD + chunked(event(text_event("", "stop")), event(usage_event(3, 0)), b"data: [DONE]\n\n")
    )
    assert record.outcome is Outcome.COMPLETED
    assert (record.num_output_tokens, record.ttft_s, record.tpot_s) == (0, None, None)


@pytest.mark.parametrize("close", [False, True])
@async_test
async def test_error_event_is_the_reason_whatever_follows(close):
    error = event({"error": {"message": "worker attention/0 was lost", "code": "worker_lost"}})
    end = b"" if close else b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
    record, _ = await answer(HEAD + chunked(EVENTS[0], error)[:-5] + end, close=close)
    assert record.outcome is Outcome.STREAM_ERROR
    assert record.error == "worker attention/0 was lost"
    assert record.num_output_tokens == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://127.0.0.1:8000", ServerUrl("127.0.0.1", 8000, False, "")),
        ("127.0.0.1:8000/", ServerUrl("127.0.0.1", 8000, False, "")),
        ("http://host/v1/", ServerUrl("host", 80, False, "")),
        ("https://host/models/a/v1", ServerUrl("host", 443, True, "/models/a")),
        ("http://[::1]:9", ServerUrl("::1", 9, False, "")),
    ],
)
def test_urls(text, expected):
    assert ServerUrl.parse(text) == expected


def test_host_header_of_an_ipv6_address():
    assert ServerUrl.parse("http://[::1]:9").authority == "[::1]:9"


@pytest.mark.parametrize(
    "text", ["", "ftp://x", "http://", "http://x:99999", "http://x:y", "http://a b", "http://a\r\nb"]
)
def test_bad_urls(text):
    with pytest.raises(ConfigError, match="--url"):
        ServerUrl.parse(text)
