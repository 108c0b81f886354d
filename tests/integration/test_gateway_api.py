"""The OpenAI API against scripted workers: shapes, parameters, streams, log-probabilities, stops."""

import pytest

from tests.fakes.async_test import async_test
from tests.fakes.gateway import events, gateway, saying, text_of
from tests.fakes.text_model import ids_model, text_model
from tests.fakes.worker import counting_tokens

MODEL = text_model()
TOKENIZER = MODEL.tokenizer


def counted(prompt_ids, count):
    return [counting_tokens(prompt_ids, idx) for idx in range(count)]


@async_test
async def test_chat_answer():
    async with gateway(MODEL) as rig:
        rig.worker.script = saying(MODEL, "hello world")
        rig.worker.cached_tokens = 4
        answer = await rig.chat("hi", model="tiny")
        (submit,) = rig.worker.submits()
    assert answer.status_code == 200
    body = answer.json()
    assert body["object"] == "chat.completion"
    assert body["id"] == f"chatcmpl-{answer.headers['x-request-id']}"
    assert body["model"] == "tiny"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hello world"},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    prompt = "<|start|>user\nhi<|end|>\n<|start|>assistant\n"
    assert submit.prompt_ids == TOKENIZER.encode(prompt)
    num_output = len(TOKENIZER.encode("hello world")) + 1
    assert body["usage"] == {
        "prompt_tokens": len(submit.prompt_ids),
        "completion_tokens": num_output,
        "total_tokens": len(submit.prompt_ids) + num_output,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


@async_test
async def test_chat_stream():
    async with gateway(MODEL) as rig:
        rig.worker.script = saying(MODEL, "hello 日本 world")
        answer = await rig.chat("hi", stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    stream = events(answer.text)
    assert text_of(stream) == "hello 日本 world"
    *chunks, usage = stream  # how many chunks there are depends on how fast the reader is
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert all("role" not in event["choices"][0]["delta"] for event in chunks[1:])
    assert {event["object"] for event in stream} == {"chat.completion.chunk"}
    assert len({(event["id"], event["created"], event["model"]) for event in stream}) == 1
    assert [event["choices"][0]["finish_reason"] for event in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all(event["usage"] is None for event in chunks)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(TOKENIZER.encode("hello 日本 world")) + 1


@async_test
async def test_stream_without_usage_and_with_continuous_usage():
    async with gateway(MODEL) as rig:
        plain = events((await rig.chat(max_tokens=4, stream=True)).text)
        options = {"include_usage": True, "continuous_usage_stats": True}
        counting = events((await rig.chat(max_tokens=4, stream=True, stream_options=options)).text)
    assert all("usage" not in event for event in plain)
    counts = [event["usage"]["completion_tokens"] for event in counting]
    assert counts == sorted(counts)
    assert counts[-1] == 4


@async_test
@pytest.mark.parametrize("prompt_form", ["text", "texts", "ids", "id lists"])
async def test_completion_prompt_forms(prompt_form):
    one, two = TOKENIZER.encode("hello"), TOKENIZER.encode(" world")
    prompt = {"text": "hello", "texts": ["hello", " world"], "ids": one, "id lists": [one, two]}[prompt_form]
    expected = [one] if prompt_form in ("text", "ids") else [one, two]
    async with gateway(MODEL) as rig:
        answer = await rig.complete(prompt, max_tokens=3, return_token_ids=True)
        submits = rig.worker.submits()
    body = answer.json()
    assert body["object"] == "text_completion"
    assert [submit.prompt_ids for submit in submits] == expected
    assert [choice["index"] for choice in body["choices"]] == list(range(len(expected)))
    for choice, prompt_ids in zip(body["choices"], expected, strict=True):
        assert choice["token_ids"] == counted(prompt_ids, 3)
        assert choice["text"] == TOKENIZER.decode(counted(prompt_ids, 3))
        assert choice["prompt_token_ids"] == prompt_ids
        assert choice["finish_reason"] == "length"
    assert body["usage"]["prompt_tokens"] == sum(map(len, expected))
    assert body["usage"]["completion_tokens"] == 3 * len(expected)


@async_test
async def test_n_choices_share_the_seed_and_count_the_prompt_once():
    async with gateway(MODEL) as rig:
        answer = await rig.complete([[1, 2], [3]], n=3, max_tokens=2, temperature=0)
        stream = events((await rig.complete([1, 2], n=2, max_tokens=3, stream=True)).text)
        submits = rig.worker.submits()
    body = answer.json()
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    assert body["usage"]["prompt_tokens"] == 3
    assert body["usage"]["completion_tokens"] == 12
    first = submits[:6]
    assert [submit.sampling.choice for submit in first] == [0, 1, 2, 0, 1, 2]
    assert len({submit.sampling.seed for submit in first}) == 1
    assert len({submit.req_id for submit in submits}) == 8
    assert submits[6].sampling.seed != first[0].sampling.seed  # drawn anew for each request
    for index in range(2):
        assert text_of(stream, index) == TOKENIZER.decode(counted([1, 2], 3))


@async_test
async def test_sampling_parameters_reach_the_worker():
    fields = {
        "max_completion_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "seed": -3,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.2,
        "min_tokens": 2,
        "stop_token_ids": [7, 8],
        "logit_bias": {"5": -100, "6": 2.5},
        "priority": -2,
        "user": "someone",
    }
    async with gateway(MODEL) as rig:
        await rig.chat(**fields)
        await rig.chat(max_tokens=1, ignore_eos=True, logprobs=True)
        await rig.chat(max_tokens=1, top_k=-1)
        first, second, third = rig.worker.submits()
    sampling = first.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (5, 0.5, 0.9, 40)
    assert (sampling.min_p, sampling.seed, sampling.min_tokens) == (0.05, -3, 2)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.5, -0.5, 1.2)
    assert sampling.stop_token_ids == (7, 8, *MODEL.eos_token_ids)
    assert sampling.logit_bias == ((5, -100.0), (6, 2.5))
    assert sampling.logprobs == -1
    assert first.priority == -2
    assert second.sampling.stop_token_ids == ()
    assert second.sampling.logprobs == 0
    assert (third.sampling.temperature, third.sampling.top_k) == (1.0, 0)


@async_test
async def test_defaults_of_max_tokens():
    async with gateway(text_model(max_context=40)) as rig:
        chat = (await rig.chat("hi")).json()
        completion = (await rig.complete([1, 2, 3])).json()
        near_the_end = (await rig.complete([1] * 35)).json()
    assert chat["usage"]["total_tokens"] == 40
    assert completion["usage"]["completion_tokens"] == 16
    assert near_the_end["usage"]["completion_tokens"] == 5


@async_test
async def test_the_smallest_kv_cache_bounds_the_context():
    """`max_model_len`, the default of max_tokens, generous wishes and refusals all go by what the workers report."""
    async with gateway(text_model(max_context=200), num_workers=2) as rig:
        rig.workers[0].max_tokens, rig.workers[1].max_tokens = 150, 60
        for worker in rig.workers:
            await worker.send_stats()
        await rig.wait_until(lambda: rig.service.model.max_context == 60)
        assert (await rig.client.get("/v1/models")).json()["data"][0]["max_model_len"] == 60
        assert (await rig.client.get("/cluster")).json()["max_context"] == 60
        for wish in ({}, {"max_tokens": 150}, {"max_completion_tokens": 10_000}):
            assert (await rig.chat(ignore_eos=True, **wish)).json()["usage"]["total_tokens"] == 60
        answer = await rig.complete([5] * 60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
        rig.publish(rig.workers[:1])  # the small one leaves
        await rig.wait_until(lambda: rig.service.model.max_context == 150)


@async_test
async def test_stop_strings_end_the_text_and_the_work():
    async with gateway(MODEL) as rig:
        rig.worker.script = saying(MODEL, "one, two, three, four", end=False)
        answer = (await rig.chat(stop=["three", "zzz"], max_tokens=200)).json()
        stream = events((await rig.chat(stop=", t", max_tokens=200, stream=True)).text)
        included = (await rig.chat(stop="two", max_tokens=200, include_stop_str_in_output=True)).json()
        await rig.worker.wait_until(lambda: len(rig.worker.aborted) == 3)
    choice = answer["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("one, two, ", "stop")
    assert choice["stop_reason"] == "three"
    assert text_of(stream) == "one"
    assert stream[-1]["choices"][0]["finish_reason"] == "stop"
    assert included["choices"][0]["message"]["content"] == "one, two"


@async_test
async def test_stop_token_ids():
    async with gateway(MODEL) as rig:
        rig.worker.script = saying(MODEL, "abcdef")
        (stop_id,) = TOKENIZER.encode("c")
        choice = (await rig.chat(stop_token_ids=[stop_id])).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == ("ab", "stop", stop_id)


@async_test
async def test_chat_logprobs():
    async with gateway(MODEL) as rig:
        rig.worker.script = saying(MODEL, "日")
        body = (await rig.chat(logprobs=True, top_logprobs=2, max_tokens=2)).json()
        stream = events((await rig.chat(logprobs=True, max_tokens=2, stream=True)).text)
    first, second = body["choices"][0]["logprobs"]["content"]
    assert bytes(first["bytes"]) == "日".encode()[:1]
    assert first["token"] == "\ufffd"
    assert first["logprob"] == -0.5
    assert [top["logprob"] for top in first["top_logprobs"]] == [-0.5, -1.5]
    assert second["bytes"] == ["日".encode()[1]]
    streamed = [entry for event in stream for entry in event["choices"][0]["logprobs"]["content"]]
    assert [entry["bytes"] for entry in streamed] == [first["bytes"], second["bytes"]]
    assert all(entry["top_logprobs"] == [] for entry in streamed)


@async_test
async def test_completion_logprobs():
    async with gateway(MODEL) as rig:
        rig.worker.script = saying(MODEL, "hello 日")
        logprobs = (await rig.complete("x", logprobs=1, max_tokens=4)).json()["choices"][0]["logprobs"]
        only_sampled = (await rig.complete("x", logprobs=0, max_tokens=1)).json()["choices"][0]["logprobs"]
        stream = events((await rig.complete("x", logprobs=1, max_tokens=4, stream=True)).text)
    assert logprobs["tokens"] == ["hello", " ", "bytes:\\xe6", "bytes:\\x97"]
    assert logprobs["token_logprobs"] == [-0.5] * 4
    assert logprobs["top_logprobs"][0] == {"hello": -0.5}
    assert logprobs["text_offset"] == [0, 5, 6, 6]
    assert only_sampled["top_logprobs"] == [{"hello": -0.5}]
    merged = {key: [] for key in logprobs}
    for event in stream:
        for key, values in event["choices"][0]["logprobs"].items():
            merged[key] += values
    assert merged == logprobs


@async_test
async def test_echo():
    async with gateway(MODEL) as rig:
        rig.worker.script = saying(MODEL, " world")
        answer = (await rig.complete(["hello", "oh"], echo=True, n=2)).json()
        stream = events((await rig.complete("hello", echo=True, stream=True)).text)
    assert [choice["text"] for choice in answer["choices"]] == ["hello world"] * 2 + ["oh world"] * 2
    assert text_of(stream) == "hello world"


@async_test
async def test_a_model_without_tokenizer_serves_token_ids():
    async with gateway(ids_model()) as rig:
        choice = (await rig.complete([1, 2], max_tokens=3, logprobs=2)).json()["choices"][0]
        stream = events((await rig.complete([1, 2], max_tokens=3, stream=True)).text)
        refused = [
            await rig.complete("text", max_tokens=3),
            await rig.chat("hi"),
            await rig.complete([1], stop="x"),
            await rig.client.post("/tokenize", json={"prompt": "x"}),
        ]
    ids = counted([1, 2], 3)
    assert choice["token_ids"] == ids
    assert choice["text"] == ""
    assert choice["logprobs"]["tokens"] == [str(token_id) for token_id in ids]
    assert choice["logprobs"]["top_logprobs"][0] == {str(ids[0]): -0.5, str(ids[0] + 1): -1.5}
    assert [token_id for event in stream for token_id in event["choices"][0]["token_ids"]] == ids
    for answer in refused:
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "no_tokenizer"
        assert "token ids" in answer.json()["error"]["message"]


@async_test
async def test_chat_content_parts_and_roles():
    async with gateway(MODEL) as rig:
        messages = [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "output_text", "text": "b"}]},
        ]
        await rig.client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1})
        (submit,) = rig.worker.submits()
    expected = "<|start|>system\nbe brief<|end|>\n<|start|>user\na\nb<|end|>\n<|start|>assistant\n"
    assert TOKENIZER.decode(submit.prompt_ids, skip_special_tokens=False) == expected


@async_test
async def test_models_and_tokens():
    async with gateway(MODEL) as rig:
        get, post = rig.client.get, rig.client.post
        models = (await get("/v1/models")).json()
        one = (await get("/v1/models/tiny-alias")).json()
        missing = await get("/v1/models/gpt-4")
        tokens = (await post("/tokenize", json={"prompt": "hello world", "return_token_strs": True})).json()
        text = (await post("/detokenize", json={"tokens": tokens["tokens"]})).json()
        chat = (await post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]})).json()
    assert [card["id"] for card in models["data"]] == ["tiny"]
    assert one == models["data"][0]
    assert one["max_model_len"] == 256
    assert missing.status_code == 404
    assert tokens["tokens"] == TOKENIZER.encode("hello world")
    assert tokens["count"] == len(tokens["tokens"])
    assert tokens["token_strs"][0] == "hello"
    assert text == {"prompt": "hello world"}
    assert TOKENIZER.decode(chat["tokens"], skip_special_tokens=False).endswith("<|start|>assistant\n")


@async_test
async def test_request_ids():
    async with gateway(MODEL) as rig:
        given = await rig.client.get("/version", headers={"X-Request-Id": "abc-123"})
        drawn = await rig.client.get("/version")
        unusable = await rig.client.get("/version", headers={"X-Request-Id": "x" * 200})
    assert given.headers["x-request-id"] == "abc-123"
    assert len(drawn.headers["x-request-id"]) == 32
    assert len(unusable.headers["x-request-id"]) == 32


@async_test
async def test_operators_routes():
    async with gateway(MODEL) as rig:
        get = rig.client.get
        await rig.chat(max_tokens=3)
        await rig.chat(max_tokens=1)
        assert (await get("/livez")).status_code == 200
        assert (await get("/readyz")).json() == {"status": "ok"}
        assert (await get("/health")).status_code == 200
        assert "version" in (await get("/version")).json()
        assert "<html" in (await get("/")).text
        cluster = (await get("/cluster")).json()
        metrics = (await get("/metrics")).text
        api = (await get("/openapi.json")).json()
    assert cluster["ready"]
    assert cluster["members"][0]["stats"]["kv_blocks_total"] == 100
    for line in (
        'vllm:generation_tokens_total{model_name="tiny"} 4.0',
        'vllm:request_success_total{finished_reason="length",model_name="tiny"} 2.0',
        'vllm:time_to_first_token_seconds_count{model_name="tiny"} 2.0',
        'vllm:request_time_per_output_token_seconds_count{model_name="tiny"} 1.0',
        'vllm:num_requests_running{engine="0",model_name="tiny"}',
        'vllm:kv_cache_usage_perc{engine="0",model_name="tiny"}',
        'afd_gateway_http_requests_total{path="/v1/chat/completions",status="200"} 2.0',
        "afd_sla_window_requests 2.0",
        'afd_gateway_worker_up{rank="0"} 1.0',
    ):
        assert line in metrics, line
    assert "ChatBody" in api["components"]["schemas"]
