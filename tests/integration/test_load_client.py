"""The benchmark's client against a scripted server on a loopback socket: failures, refusals, connections."""

import asyncio
import time

import pytest

from afd.errors import ConfigError
from afd.load import http1
from afd.load.client import CompletionSettings, complete
from afd.load.http1 import HttpClient, ServerUrl
from afd.load.record import Outcome, RequestRecord
from afd.load.server_info import ServerInfo, ask_server
from afd.load.workload import Prompt
from tests.fakes.async_test import async_test
from tests.fakes.openai_server import FakeServer, completion, fake_server, text_event

PROMPT = Prompt([5, 6, 7], 3, 4)


async def ask(client, *, timeout_s=10.0, endpoint="completions"):
    settings = CompletionSettings("m", endpoint=endpoint, timeout_s=timeout_s)
    record = RequestRecord(0, PROMPT.num_tokens)
    await complete(client, settings, settings.encode(PROMPT), record)
    return record


async def ask_once(fake, **settings):
    client = HttpClient(ServerUrl.parse(fake.url))
    try:
        return await ask(client, **settings)
    finally:
        await client.close()


@async_test
async def test_a_good_answer():
    async with fake_server() as fake:
        record = await ask_once(fake)
    assert (record.outcome, record.num_prompt_tokens, record.num_output_tokens) == (Outcome.COMPLETED, 3, 4)
    assert record.start_s < record.token_times[0] <= record.token_times[-1] == record.end_s
    sent = fake.requests[0]
    assert (sent.method, sent.path, sent.headers["content-type"]) == ("POST", "/v1/completions", "application/json")
    assert sent.json == {
        "model": "m",
        "prompt": [5, 6, 7],
        "max_tokens": 4,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }


@async_test
async def test_times_are_when_tokens_came():
    allow = asyncio.Event()

    async def script(request, reply):
        await reply.start_stream()
        await reply.event(text_event("a"))
        await allow.wait()
        await reply.event(text_event("b", "stop"))
        await reply.end_stream()

    async with fake_server(script) as fake:
        client = HttpClient(ServerUrl.parse(fake.url))
        settings = CompletionSettings("m")
        record = RequestRecord(0, 3)
        asking = asyncio.create_task(complete(client, settings, settings.encode(PROMPT), record))
        async with asyncio.timeout(5):
            while not record.token_times:
                await asyncio.sleep(0.001)
        between_s = time.perf_counter()
        allow.set()
        await asking
        await client.close()
    assert record.token_times[0] < between_s < record.token_times[1]


@pytest.mark.parametrize(
    ("status", "headers", "body", "outcome", "retry_after_s", "error"),
    [
        (503, "Retry-After: 3\r\n", {"error": {"message": "queue full"}}, Outcome.REFUSED, 3.0, "HTTP 503: queue full"),
        (503, "Retry-After: Fri, 01 Jan 2027 00:00:00 GMT\r\n", {"error": "x"}, Outcome.REFUSED, None, "HTTP 503: x"),
        (429, "", {"message": "slow down"}, Outcome.REFUSED, None, "HTTP 429: slow down"),
        (400, "", {"error": {"message": "bad prompt"}}, Outcome.HTTP_ERROR, None, "HTTP 400: bad prompt"),
        (404, "", {"detail": "Not Found"}, Outcome.HTTP_ERROR, None, "HTTP 404: Not Found"),
        (500, "", b"<h1>oops</h1>", Outcome.HTTP_ERROR, None, "HTTP 500: <h1>oops</h1>"),
        (502, "", b"", Outcome.HTTP_ERROR, None, "HTTP 502: no message"),
        (500, "", b"x" * 200_000, Outcome.HTTP_ERROR, None, "HTTP 500: xxx"),
        (204, "", b"", Outcome.HTTP_ERROR, None, "HTTP 204: no message"),
    ],
)
@async_test
async def test_statuses(status, headers, body, outcome, retry_after_s, error):
    async with fake_server(lambda request, reply: reply.json(body, status, headers)) as fake:
        record = await ask_once(fake)
    assert (record.outcome, record.status, record.retry_after_s) == (outcome, status, retry_after_s)
    assert record.error.startswith(error)
    assert len(record.error) <= 400
    assert record.end_s > record.start_s


@async_test
async def test_disconnect_in_the_middle_keeps_what_came():
    async def script(request, reply):
        await reply.start_stream()
        await reply.event(text_event("a"))
        await reply.event(text_event("b"))
        reply.disconnect()

    async with fake_server(script) as fake:
        record = await ask_once(fake)
    assert record.outcome is Outcome.DISCONNECTED
    assert record.num_output_tokens == len(record.token_times) == 2


@async_test
async def test_disconnect_without_a_word():
    async def script(request, reply):
        reply.disconnect()

    async with fake_server(script) as fake:
        record = await ask_once(fake)
    assert record.outcome is Outcome.DISCONNECTED
    assert "before it answered" in record.error


@async_test
async def test_stalled_stream_times_out_and_is_hung_up_on():
    hung_up = asyncio.Event()

    async def script(request, reply):
        await reply.start_stream()
        await reply.event(text_event("a"))
        try:
            while True:
                await reply.chunk(b": still here\n\n")
                await asyncio.sleep(0.01)
        finally:
            hung_up.set()

    async with fake_server(script) as fake:
        record = await ask_once(fake, timeout_s=0.2)
        await asyncio.wait_for(hung_up.wait(), 5)
    assert record.outcome is Outcome.TIMEOUT
    assert "0.2 s" in record.error
    assert record.num_output_tokens == 1
    assert 0.2 <= record.e2el_s < 2


@async_test
async def test_nobody_listens():
    async with fake_server() as fake:
        pass
    record = await ask_once(fake)
    assert record.outcome is Outcome.CONNECT_FAILED
    assert "refused" in record.error


@async_test
async def test_cancelling_marks_the_record_and_closes_the_connection():
    async def script(request, reply):
        await reply.start_stream()
        started.set()
        await asyncio.Event().wait()

    started = asyncio.Event()
    async with fake_server(script) as fake:
        client = HttpClient(ServerUrl.parse(fake.url))
        settings = CompletionSettings("m")
        record = RequestRecord(0, 3)
        asking = asyncio.create_task(complete(client, settings, settings.encode(PROMPT), record))
        await asyncio.wait_for(started.wait(), 5)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await client.close()
    assert record.outcome is Outcome.INTERRUPTED
    assert not record.failed


@async_test
async def test_connections_are_kept_and_shared():
    async with fake_server() as fake:
        client = HttpClient(ServerUrl.parse(fake.url))
        for _ in range(5):
            assert (await ask(client)).completed
        assert fake.num_connections == 1
        records = await asyncio.gather(*(ask(client) for _ in range(4)))
        assert all(record.completed for record in records)
        assert fake.num_connections == 4
        await client.close()


@async_test
async def test_a_connection_that_was_idle_for_long_is_not_trusted(monkeypatch):
    monkeypatch.setattr(http1, "MAX_IDLE_S", 0.0)
    async with fake_server() as fake:
        client = HttpClient(ServerUrl.parse(fake.url))
        for _ in range(3):
            assert (await ask(client)).completed
        assert fake.num_connections == 3
        await client.close()


@async_test
async def test_a_server_that_closes_idle_connections_costs_no_request():
    async def script(request, reply):
        await completion(request, reply)
        reply.disconnect()

    async with fake_server(script) as fake:
        client = HttpClient(ServerUrl.parse(fake.url))
        for expected in range(1, 4):
            assert (await ask(client)).completed
            async with asyncio.timeout(5):
                while client._open:  # the close has reached the client
                    await asyncio.sleep(0.001)
            assert fake.num_connections == expected
        await client.close()


@async_test
async def test_api_key_is_sent_and_checked():
    async with fake_server() as fake:
        client = HttpClient(ServerUrl.parse(fake.url), api_key="sesame")
        await ask(client)
        await client.close()
    assert fake.requests[0].headers["authorization"] == "Bearer sesame"
    with pytest.raises(ConfigError, match="API key"):
        HttpClient(ServerUrl.parse(fake.url), api_key="a\r\nX-Evil: 1")


async def info(fake: FakeServer, model=None):
    client = HttpClient(ServerUrl.parse(fake.url))
    try:
        return await ask_server(client, model)
    finally:
        await client.close()


@async_test
async def test_what_servers_say_of_themselves():
    async with fake_server() as fake:
        assert await info(fake) == ServerInfo("m", vocab_size=1000)
    async with fake_server(cluster={"topology": "2A1F"}, version={"version": "9"}) as fake:
        found = await info(fake)
        assert (found.topology, found.num_workers, found.version) == ("2A1F", 3, "9")
        assert (await info(fake, "other")).model == "other"
    async with fake_server(cluster={"topology": "mono"}) as fake:
        assert (await info(fake)).num_workers == 1
    async with fake_server(cluster={"topology": "a ring"}, version=[]) as fake:  # not ours
        assert (await info(fake)).num_workers is None
    async with fake_server() as fake:
        del fake.get["/v1/models"]
        assert (await info(fake, "m")).model == "m"
        with pytest.raises(ConfigError, match="HTTP 404"):
            await info(fake)
        fake.get["/v1/models"] = {"data": []}
        with pytest.raises(ConfigError, match="names no model"):
            await info(fake)
        fake.get["/v1/models"] = b"garbage"
        with pytest.raises(ConfigError, match="names no model"):
            await info(fake)
        fake.get["/v1/models"] = b"x" * (5 << 20)
        with pytest.raises(ConfigError, match="more than"):
            await info(fake)
    with pytest.raises(ConfigError, match="is the server running"):
        await info(fake)
