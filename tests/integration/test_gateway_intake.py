"""Long requests are read by other processes: the same answers, turns for everybody, and nothing that holds the loop."""

import asyncio
import dataclasses
import json
import subprocess
import threading
import time

import msgspec
import psutil
import pytest

from afd.config import GatewayConfig
from afd.errors import AfdError, RequestError
from afd.gateway.intake.intake import Intake, is_short
from afd.gateway.intake.process import ReaderProcess
from afd.gateway.intake.protocol import Setup, pack, unpack
from afd.gateway.intake.reader import RawRequest, RequestReader
from afd.gateway.templating import ChatTemplate
from afd.gateway.tokenizer import TextTokenizer
from tests.fakes.async_test import async_test
from tests.fakes.gateway import events, gateway, text_of
from tests.fakes.text_model import byte_tokenizer, text_model

MODEL = text_model(max_context=1 << 14)
LIMITS = GatewayConfig()
PROMPTS = ["hello world", "🌊", "w" * 40]
REQUESTS = {
    "chat": {"messages": [{"role": "user", "content": "hello " * 900}], "stream": True, "logprobs": True, "n": 2},
    "completions": {"prompt": PROMPTS, "echo": True, "max_tokens": 7, "stop": ["x"], "logit_bias": {"5": 1.5}},
    "tokenize": {"prompt": "hello world", "return_token_strs": True},
    "detokenize": {"tokens": [5, 6, 7]},
}


def raw(route, body, max_context=MODEL.max_context, headers=None):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return RawRequest(route, data, headers or {}, max_context)


def same_seed(prepared):
    """A seed is drawn where none is given."""
    if prepared.job is None:
        return prepared
    prompts = [(ids, dataclasses.replace(sampling, seed=1)) for ids, sampling in prepared.job.prompts]
    prepared.job = dataclasses.replace(prepared.job, prompts=prompts)
    return prepared


@pytest.mark.parametrize("route", REQUESTS)
def test_what_crosses_between_processes_arrives_whole(route):
    request = raw(route, REQUESTS[route], headers={"x-sla-ttft-ms": "77"})
    prepared = RequestReader(MODEL, LIMITS).read(request)
    reply, ids = pack(prepared)
    reply = msgspec.msgpack.decode(msgspec.msgpack.encode(reply), type=type(reply))
    *waits, arrived = unpack(route, reply, memoryview(ids))
    assert waits == [None] * len(reply.lengths)
    assert arrived == prepared


@pytest.mark.parametrize("splits_special", [False, True])
def test_special_tokens_in_a_text_count_for_as_much_in_a_process(splits_special):
    tokenizer = byte_tokenizer()
    tokenizer.encode_special_tokens = splits_special
    model = dataclasses.replace(MODEL, tokenizer=TextTokenizer(tokenizer))
    setup = msgspec.msgpack.decode(msgspec.msgpack.encode(Setup.of(model, LIMITS)), type=Setup)
    ids = setup.restore(ChatTemplate).tokenizer.encode("a<|end|>")
    assert ids == model.tokenizer.encode("a<|end|>")
    assert (len(ids) == 2) is not splits_special


@async_test
async def test_a_process_reads_as_the_event_loop_does():
    reader, process = RequestReader(MODEL, LIMITS), ReaderProcess(msgspec.msgpack.encode(Setup.of(MODEL, LIMITS)))
    try:
        for route, body in REQUESTS.items():
            request = raw(route, body)
            assert same_seed(await process.read(request)) == same_seed(reader.read(request))
        for route, body in (("chat", {}), ("completions", {"prompt": [1] * 200}), ("tokenize", b"{")):
            request = raw(route, body, max_context=100)
            with pytest.raises(RequestError) as here:
                reader.read(request)
            with pytest.raises(RequestError) as there:
                await process.read(request)
            assert vars(here.value) == vars(there.value)
            assert str(here.value) == str(there.value)
    finally:
        process.close()


@async_test
async def test_a_request_that_hangs_or_kills_its_process_harms_no_other():
    """The template stands for whatever can take for ever, or all memory, in one uninterruptible call."""
    source = (
        "{% if messages[0].content == 'kill' %}{{ (messages[0].content * 9999999999) | length }}"
        "{% elif messages[0].content == 'hang' %}{{ (6 + messages | length) ** (7 ** 11) % 10 }}"
        "{% else %}{{ messages[0].content }}{% endif %}"
    )
    model = dataclasses.replace(MODEL, template=ChatTemplate({"default": source}))
    setup = msgspec.msgpack.encode(Setup.of(model, LIMITS))
    process, hasty = ReaderProcess(setup), ReaderProcess(setup, read_s=1.0)
    try:

        def chat(content):
            return raw("chat", {"messages": [{"role": "user", "content": content}]})

        assert (await process.read(chat("fine"))).job is not None
        with pytest.raises(RequestError, match=r"refuses|memory"):
            await process.read(chat("kill"))
        await hasty.start()
        (child,) = [p for p in psutil.Process().children() if p.pid == hasty.pid]
        with pytest.raises(AfdError, match="took longer than 1 s"):
            await hasty.read(chat("hang"))
        child.wait(10.0)
        assert (await hasty.read(chat("fine"))).job is not None
        psutil.Process(process.pid).kill()
        with pytest.raises(AfdError, match="ended with this one"):
            await process.read(chat("fine"))
        assert (await process.read(chat("fine"))).job is not None
    finally:
        process.close()
        hasty.close()


@async_test
async def test_a_start_that_is_given_up_leaves_nothing(monkeypatch):
    """A child that is being made in a thread when the gateway stops is ended as soon as it is there."""
    begun, made = threading.Event(), []
    popen = subprocess.Popen

    def slow(*args, **options):
        begun.set()
        time.sleep(0.2)
        made.append(popen(*args, **options))
        return made[0]

    monkeypatch.setattr(subprocess, "Popen", slow)
    process = ReaderProcess(msgspec.msgpack.encode(Setup.of(MODEL, LIMITS)))
    starting = asyncio.create_task(process.start())
    await asyncio.to_thread(begun.wait, 10.0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    process.close()
    async with asyncio.timeout(10.0):
        while not made or made[0].returncode is None:
            await asyncio.sleep(0.01)
    assert made[0].returncode < 0


@async_test
async def test_foreign_templates_never_run_in_the_gateway(monkeypatch):
    model = dataclasses.replace(MODEL, is_foreign=True)
    monkeypatch.setattr(ChatTemplate, "render", None)
    intake = Intake(model, LIMITS)
    try:
        body = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()
        assert is_short(body)
        assert (await intake.read("chat", body, {}, 100, "me")).job is not None
        assert (await intake.read("tokenize", body, {}, 100, "me")).answer
    finally:
        await intake.close()


@async_test
async def test_many_chats_at_once_are_read_and_wait_for_nobody_s_long_one():
    """Every chat goes to the processes, as templates run there only: as many as the gateway queues may come at once."""
    hangs = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    source = f"{{% if messages[0].content | length > 9 %}}{hangs}{{% endif %}}{{{{ messages[0].content }}}}"
    model = dataclasses.replace(MODEL, is_foreign=True, template=ChatTemplate({"default": source}))
    intake = Intake(model, LIMITS)

    def chat(content):
        body = json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
        return asyncio.create_task(intake.read("chat", body, {}, MODEL.max_context, "me"))

    long = [chat("w " * 6_000) for _ in range(8)]  # together they take longer than anybody has patience
    try:
        for prepared in await asyncio.gather(*[chat("hi") for _ in range(300)]):
            assert prepared.job is not None
    finally:
        for task in long:
            task.cancel()
        await asyncio.gather(*long, return_exceptions=True)
        await intake.close()


HOSTILE = {
    "characters": ("/v1/completions", b'{"prompt":"' + "的".encode() * 500_000 + b'"}'),
    "prompts": ("/v1/completions", b'{"prompt":[' + b",".join([b'""'] * 400_000) + b"]}"),
    "lists": ("/v1/completions", b'{"prompt":[' + b",".join([b"[1]"] * 200_000) + b"]}"),
    "ids": ("/v1/completions", b'{"prompt":[' + b",".join([b"7"] * 700_000) + b"]}"),
    "messages": ("/v1/chat/completions", b'{"messages":[' + b",".join([b'{"role":"user"}'] * 90_000) + b"]}"),
    "tokenize": ("/tokenize", b'{"messages":[' + b",".join([b'{"role":"user"}'] * 90_000) + b"]}"),
    "detokenize": ("/detokenize", b'{"tokens":[' + b",".join([b"7"] * 1_400_000) + b"]}"),
    "stop ids": ("/v1/completions", b'{"prompt":"a","stop_token_ids":[' + b",".join([b"7"] * 700_000) + b"]}"),
    "logit bias": (
        "/v1/completions",
        json.dumps({"prompt": [[5]] * 1024, "logit_bias": {str(i): 1 for i in range(250)}, "n": 16}).encode(),
    ),
}


@async_test
async def test_no_request_holds_the_event_loop():
    """Every shape of a long body is refused, a stream goes on meanwhile, and the loop is at work the whole time."""
    async with gateway(MODEL) as rig:
        await rig.service.intake.read("tokenize", json.dumps({"prompt": "w " * 9_000}).encode(), {}, 1 << 14, "me")
        rig.worker.delay_s = 0.001
        streaming = asyncio.create_task(rig.complete("hi", max_tokens=3_000, stream=True, ignore_eos=True))
        for name, (path, body) in HOSTILE.items():
            busy = time.thread_time()
            answer = await rig.client.post(path, content=body)
            assert answer.status_code == 400, (name, answer.text[:200])
            assert len(answer.content) < 2_000
            assert not streaming.done(), name
            # What this thread computed meanwhile, the stream's tokens included: a body read here takes ten times that.
            assert time.thread_time() - busy < 0.5, name
        stream = events((await streaming).text)
        assert len(text_of(stream)) > 1_000


@async_test
async def test_as_many_tokens_as_a_request_may_have():
    async with gateway(MODEL, limits={"max_request_tokens": 20_000}) as rig:
        for body in ({"prompt": [[5] * 201] * 100}, {"prompt": [5] * 2_001, "n": 10}, {"prompt": ["w" * 7_000] * 3}):
            answer = await rig.complete(**body, max_tokens=1)
            assert answer.status_code == 400
            assert "gateway.max_request_tokens" in answer.json()["error"]["message"]
        assert (await rig.complete([[5] * 200] * 100, max_tokens=1)).status_code == 200
        assert (await rig.complete([5] * 2_000, n=10, max_tokens=1)).status_code == 200
