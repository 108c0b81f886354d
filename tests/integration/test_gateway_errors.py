"""Every refusal: its status, its parameter, and the one error shape."""

import re

import pytest

from afd.messages.serving import Refused
from tests.fakes.async_test import async_test
from tests.fakes.gateway import gateway
from tests.fakes.text_model import text_model
from tests.fakes.worker import FakeWorker

MODEL = text_model(max_context=64)
HI = [{"role": "user", "content": "hi"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,xx"}}

# (path, body, status, param, part of the message)
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
REFUSALS = [
    (CHAT, {}, 400, "messages", "required"),
    (CHAT, {"messages": []}, 400, "messages", "length"),
    (CHAT, {"messages": "hi"}, 400, "messages", "array"),
    (CHAT, {"messages": [{"content": "x"}]}, 400, "messages[0].role", "required"),
    (CHAT, {"messages": HI, "model": "gpt-4"}, 404, "model", "does not exist"),
    (CHAT, {"messages": HI, "temperature": -1}, 400, "temperature", ">= 0"),
    (CHAT, {"messages": HI, "temperature": "hot"}, 400, "temperature", "float"),
    (CHAT, {"messages": HI, "top_p": 0}, 400, "top_p", "> 0"),
    (CHAT, {"messages": HI, "top_p": 1.5}, 400, "top_p", "<= 1"),
    (CHAT, {"messages": HI, "n": 0}, 400, "n", ">= 1"),
    (CHAT, {"messages": HI, "n": 99}, 400, "n", "at most 16"),
    (CHAT, {"messages": HI, "max_tokens": 0}, 400, "max_tokens", ">= 1"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 100}]}, 400, "messages", "context length is 64"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 10**6}]}, 400, "messages", "context"),
    (CHAT, {"messages": HI, "min_tokens": 9, "max_tokens": 3}, 400, "min_tokens", "more than the 3"),
    (CHAT, {"messages": HI, "stop": ["a", "b", "c", "d", "e"]}, 400, "stop", "at most 4"),
    (CHAT, {"messages": HI, "stop": [""]}, 400, "stop", "empty"),
    (CHAT, {"messages": HI, "stop": "x" * 2000}, 400, "stop", "longer"),
    (CHAT, {"messages": HI, "stop_token_ids": [100000]}, 400, "stop_token_ids", "vocabulary"),
    (CHAT, {"messages": HI, "top_logprobs": 3}, 400, "top_logprobs", "needs logprobs"),
    (CHAT, {"messages": HI, "logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "<= 20"),
    (CHAT, {"messages": HI, "stream_options": {"include_usage": True}}, 400, "stream_options", "stream"),
    (CHAT, {"messages": HI, "presence_penalty": 3}, 400, "presence_penalty", "<= 2"),
    (CHAT, {"messages": HI, "repetition_penalty": 0}, 400, "repetition_penalty", ">= 0.01"),
    (CHAT, {"messages": HI, "seed": 1 << 70}, 400, "seed", "<="),
    (CHAT, {"messages": HI, "logit_bias": {"abc": 1}}, 400, "logit_bias", "token id"),
    (CHAT, {"messages": HI, "logit_bias": {"5": 101}}, 400, "logit_bias", "-100 and 100"),
    (CHAT, {"messages": [{"role": "user", "content": [IMAGE]}]}, 400, "messages[0].content[0]", "text only"),
    (CHAT, {"messages": HI, "tools": [{"type": "function"}]}, 400, "tools", "does not support"),
    (CHAT, {"messages": HI, "response_format": {"type": "json_object"}}, 400, "response_format", "structured"),
    (COMPLETIONS, {}, 400, "prompt", "required"),
    (COMPLETIONS, {"prompt": []}, 400, "prompt", "empty"),
    (COMPLETIONS, {"prompt": ""}, 400, "prompt", "no tokens"),
    (COMPLETIONS, {"prompt": [[]]}, 400, "prompt", "no tokens"),
    (COMPLETIONS, {"prompt": [1, "a"]}, 400, "prompt", "mixes"),
    (COMPLETIONS, {"prompt": [1.5]}, 400, "prompt[0]", "float"),
    (COMPLETIONS, {"prompt": [-1]}, 400, "prompt[0]", ">= 0"),
    (COMPLETIONS, {"prompt": [99999]}, 400, "prompt", "vocabulary"),
    (COMPLETIONS, {"prompt": [1] * 64}, 400, "prompt", "context length is 64"),
    (COMPLETIONS, {"prompt": [1], "logprobs": 21}, 400, "logprobs", "<= 20"),
    (COMPLETIONS, {"prompt": [1], "echo": True, "logprobs": 1}, 400, "echo", "echo"),
    (COMPLETIONS, {"prompt": [1], "suffix": "x"}, 400, "suffix", "suffix"),
    (COMPLETIONS, {"prompt": [1], "best_of": 3}, 400, "best_of", "best_of"),
    (COMPLETIONS, {"prompt": [[1]] * 1025}, 400, "prompt", "at most 1024"),
    ("/tokenize", {}, 400, "prompt", "either"),
    ("/detokenize", {"tokens": [99999]}, 400, "tokens", "vocabulary"),
]


def assert_error(answer, status, *, param=None, code=None):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert isinstance(error["type"], str)
    if param is not None:
        assert error["param"] == param
    if code is not None:
        assert error["code"] == code
    return error


@async_test
async def test_refused_parameters():
    async with gateway(MODEL) as rig:
        for path, body, status, param, text in REFUSALS:
            error = assert_error(await rig.client.post(path, json=body), status, param=param)
            assert text in error["message"], (body, error)
        assert rig.worker.submits() == []
        assert rig.service.num_requests_running == 0


@async_test
async def test_too_long_a_prompt_is_told_in_the_words_that_clients_look_for():
    """litellm goes to a longer model where a lower-cased message has one of these, other clients by the code."""
    too_long = [
        (CHAT, {"messages": [{"role": "user", "content": "x" * 100}]}),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 10**6}]}),
        (COMPLETIONS, {"prompt": [1] * 64}),
        (COMPLETIONS, {"prompt": ["x", "x" * 100]}),
    ]
    async with gateway(MODEL) as rig:
        for path, body in too_long:
            error = assert_error(await rig.client.post(path, json=body), 400, code="context_length_exceeded")
            assert error["type"] == "invalid_request_error"
            assert "this model's maximum context length is" in error["message"].lower()
            assert re.search(r"maximum context length is (\d+) tokens\.", error["message"])[1] == "64"


@async_test
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b'{"messages": NaN}', b"\xff\xfe", b"[" * 100_000])
async def test_bodies_that_are_not_a_json_object(body):
    async with gateway(MODEL, num_workers=0) as rig:
        assert_error(await rig.client.post(CHAT, content=body), 400)


@async_test
async def test_paths_and_methods():
    async with gateway(MODEL, num_workers=0) as rig:
        assert_error(await rig.client.get("/v2/nothing"), 404, code="unknown_path")
        strange = await rig.client.get("http://localhost//v1/models")
        assert_error(strange, 404, code="unknown_path")
        assert "//v1/models" in strange.json()["error"]["message"]
        answer = await rig.client.get(CHAT)
        assert_error(answer, 405, code="method_not_allowed")
        assert answer.headers["allow"] == "POST"
        assert_error(await rig.client.post("/v1/models"), 405)


@async_test
async def test_body_limit():
    async with gateway(MODEL, num_workers=0, limits={"max_body_bytes": 1000}) as rig:
        assert_error(await rig.client.post(CHAT, content=b"x" * 1001), 413, code="body_too_large")

        async def pieces():
            for _ in range(20):
                yield b"x" * 100

        assert_error(await rig.client.post(CHAT, content=pieces()), 413, code="body_too_large")


@async_test
@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate, gzip", "x" * 100])
async def test_compressed_bodies_are_called_so(encoding):
    async with gateway(MODEL, num_workers=0) as rig:
        answer = await rig.client.post(CHAT, content=b"\x1f\x8b", headers={"Content-Encoding": encoding})
        assert_error(answer, 415, code="unsupported_encoding")
        assert encoding[:32] in answer.json()["error"]["message"]
        plain = await rig.client.post(CHAT, content=b"{", headers={"Content-Encoding": "Identity"})
        assert_error(plain, 400, code="invalid_json")


@async_test
async def test_api_keys():
    async with gateway(MODEL, keys=["first key", "second"]) as rig:
        client = rig.client
        for path in ("/livez", "/readyz", "/metrics", "/version", "/"):
            assert (await client.get(path)).status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic second"}):
            answer = await client.get("/v1/models", headers=headers)
            assert_error(answer, 401, code="invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
        assert_error(await client.get("/nothing"), 401)
        for key in ("first key", "second"):
            answer = await client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == 200


@async_test
async def test_not_ready_says_why_and_when_to_come_back():
    async with gateway(MODEL, num_workers=0) as rig:

        async def reason():
            for answer in (await rig.chat(), await rig.client.get("/readyz"), await rig.client.get("/health")):
                error = assert_error(answer, 503, code="not_ready")
                assert int(answer.headers["retry-after"]) >= 1
            return error["message"]

        assert "coordinator has not answered" in await reason()
        worker = FakeWorker(b"a secret for tests, long enough")
        try:
            rig.membership.publish([])
            assert "0 of 1 attention" in await reason()
            rig.membership.coordinator_alive = False
            assert "coordinator does not answer" in await reason()
            rig.membership.coordinator_alive = True
            rig.membership.publish([worker.member(ready=False)])
            assert "no attention worker is ready" in await reason()
            rig.membership.publish([worker.member()])
            await rig.membership.wait_ready()
            assert (await rig.chat(max_tokens=1)).status_code == 200
            rig.membership.coordinator_alive = False
            assert (await rig.chat(max_tokens=1)).status_code == 200
        finally:
            await worker.close()


@async_test
async def test_a_bug_of_ours_is_a_500_in_the_same_shape(monkeypatch):
    async with gateway(MODEL) as rig:
        monkeypatch.setattr(rig.service, "generate", lambda job: 1 / 0)
        answer = await rig.chat()
        error = assert_error(answer, 500, code="internal_error")
        assert "division" not in error["message"]
        assert answer.headers["x-request-id"]


@async_test
async def test_sla_headers():
    async with gateway(MODEL, sla={"policy": "enforce", "ttft_ms": 2000.0}) as rig:
        post, body = rig.client.post, {"messages": HI, "max_tokens": 1}
        assert (await post(CHAT, json=body, headers={"x-sla-ttft-ms": "500", "x-sla-tpot-ms": "80"})).status_code == 200
        (submit,) = rig.worker.submits()
        assert submit.tpot_s == 0.08
        assert 0.3 < submit.ttft_deadline_s <= 0.5
        answer = await post(CHAT, json=body, headers={"x-sla-ttft-ms": "soon"})
        assert_error(answer, 400, param="x-sla-ttft-ms")
        rig.worker.refuse = lambda submit: Refused(submit.req_id, submit.attempt, "capacity", "busy", 7.0)
        answer = await rig.chat(max_tokens=1)  # nobody is turned away before a worker has said so
        assert_error(answer, 503, code="overloaded")
        assert answer.headers["retry-after"] == "7"
