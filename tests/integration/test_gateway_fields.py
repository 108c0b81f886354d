"""Every field of vLLM's request classes is honoured, refused by its name, or harmless; none is ignored in silence."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from afd.errors import RequestError
from afd.gateway.api.schema import chat_decoder, completion_decoder, detokenize_decoder, tokenize_decoder
from afd.gateway.templating import ChatTemplate
from tests.fakes.async_test import async_test
from tests.fakes.gateway import events, gateway, saying, text_of
from tests.fakes.text_model import ids_model, text_model

VLLM = json.loads((Path(__file__).parents[1] / "fixtures" / "vllm_request_fields.json").read_text())
MODEL = text_model()
TOKENIZER = MODEL.tokenizer
HI = [{"role": "user", "content": "hi"}]
# kind -> (path, decoder, the smallest body)
KINDS = {
    "chat": ("/v1/chat/completions", chat_decoder, {"messages": HI, "max_tokens": 1}),
    "completion": ("/v1/completions", completion_decoder, {"prompt": "hi", "max_tokens": 1}),
    "tokenize": ("/tokenize", tokenize_decoder, {"messages": HI}),
    "detokenize": ("/detokenize", detokenize_decoder, {"tokens": [1]}),
}
# They ask for nothing that could be missing from the answer.
HARMLESS = {
    "parallel_tool_calls",
    "spaces_between_special_tokens",
    "media_io_kwargs",
    "mm_processor_kwargs",
    "mm_payload",
    "return_mm_kwargs",
    "request_id",
    "session_id",
    "stream_interval",
    "kv_transfer_params",
    "ec_transfer_params",
    "vllm_xargs",
    "watermarking",
    "routed_experts_prompt_start",
}
HARMLESS_OF_OPENAI = {
    "store": False,
    "metadata": {"a": "b"},
    "service_tier": "auto",
    "prediction": None,
    "verbosity": "low",
    "prompt_cache_key": "k",
    "safety_identifier": "me",
}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}
TOOL = {"type": "function", "function": {"name": "f"}}
# A value of each field that the answer would have to show.
ASKING = {
    "structured_outputs": {"choice": ["yes", "no"]},
    "guided_json": {"type": "object"},
    "guided_regex": "a+",
    "guided_choice": ["yes", "no"],
    "guided_grammar": "root ::= 'a'",
    "regex": "a+",
    "json_schema": {"type": "object"},
    "ebnf": 'root ::= "a"',
    "grammar": 'root ::= "a"',
    "stop_regex": ["a+"],
    "no_repeat_ngram_size": 2,
    "typical_p": 0.5,
    "repeat_penalty": 1.5,
    "mirostat": 2,
    "dry_multiplier": 0.8,
    "xtc_probability": 0.5,
    "dynatemp_range": 0.4,
    "logits_processors": ["a.b"],
    "custom_logit_processor": "x",
    "lora_path": "x",
    "return_hidden_states": True,
    "n_probs": 2,
    "n_predict": 5,
    "max_new_tokens": 5,
    "min_new_tokens": 5,
    "best_of": 2,
    "allowed_token_ids": [5],
    "bad_words": ["hello"],
    "thinking_token_budget": 0,
    "repetition_detection": {"max_pattern_size": 4},
    "use_beam_search": True,
    "length_penalty": 0.5,
    "prompt_logprobs": 0,
    "logprob_token_ids": [5],
    "return_token_offsets": True,
    "truncate_prompt_tokens": 5,
    "truncation_side": "left",
    "cache_salt": "salt",
    "reasoning_effort": "high",
    "include_reasoning": False,
    "echo": True,
    "chat_template": "{{ messages }}",
    "documents": [{"text": "x"}],
    "return_prompt_text": True,
    "functions": [{"name": "f"}],
    "function_call": "auto",
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy"},
    "prompt_embeds": "AAAA",
    "suffix": "x",
    "reasoning": {"effort": "high"},
    "thinking": {"type": "disabled"},
    "enable_thinking": False,
    "reasoning_format": "parsed",
    "reasoning_budget": 0,
    "thinking_budget": 100,
    "prompt_mode": "reasoning",
    "safe_prompt": True,
    "web_search_options": {},
    "format": "json",
    "top_n_sigma": 1.5,
    "top_a": 0.2,
    "tfs_z": 0.9,
    "samplers": ["top_k"],
    "do_sample": False,
    "lora": [{"id": 0, "scale": 0.5}],
    "num_predict": 5,
    "random_seed": 5,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_has_one_place(kind):
    _, decoder, _ = KINDS[kind]
    honoured, refused = set(decoder.body_type.__struct_fields__), set(decoder.unsupported.schema())
    assert not set(VLLM[kind]) - honoured - refused - HARMLESS
    assert not honoured & refused
    assert not (honoured | refused) & HARMLESS


@async_test
@pytest.mark.parametrize("kind", KINDS)
async def test_fields_that_are_not_served_are_refused_by_name(kind):
    path, decoder, body = KINDS[kind]
    async with gateway(MODEL) as rig:
        for name, harmless in decoder.unsupported.fields.items():
            answer = await rig.client.post(path, json={**body, name: ASKING[name]})
            error = answer.json()["error"]
            assert (answer.status_code, error["param"], error["code"]) == (400, name, "unsupported"), name
            assert name in error["message"]
            for value in (None, *harmless):
                answer = await rig.client.post(path, json={**body, name: value})
                assert answer.status_code == 200, (name, value, answer.text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_byte_order_mark_before_the_body_is_passed_over(kind):
    _, decoder, body = KINDS[kind]
    data = json.dumps(body).encode()
    assert decoder.decode(b"\xef\xbb\xbf" + data) == decoder.decode(data)
    for bad in (b"\xef\xbb", b"\xef\xbb\xbf", b"\xef\xbb\xbf" * 2 + data, b" \xef\xbb\xbf" + data):
        with pytest.raises(RequestError, match="not valid JSON"):
            decoder.decode(bad)


@async_test
@pytest.mark.parametrize("kind", KINDS)
async def test_a_body_with_every_field_at_its_default_is_served(kind):
    path, _, body = KINDS[kind]
    optional = {name: value for name, value in VLLM[kind].items() if name not in ("messages", "prompt", "tokens")}
    async with gateway(MODEL) as rig:
        answer = await rig.client.post(path, json={**optional, **body})
        with_openai = await rig.client.post(
            path, json={**optional, **HARMLESS_OF_OPENAI, **body, "new_field": {"x": 1}}
        )
    assert answer.status_code == with_openai.status_code == 200, (answer.text, with_openai.text)


@async_test
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": HI, "response_format": SCHEMA}, "response_format"),
        ({"prompt": "hi", "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": HI, "tools": [TOOL]}, "tools"),
        ({"messages": HI, "tool_choice": "required"}, "tool_choice"),
        ({"messages": HI, "tool_choice": "auto"}, "tool_choice"),
        ({"messages": HI, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"messages": HI, "temperature": 2.1}, "temperature"),
        ({"messages": HI, "top_logprobs": 1}, "top_logprobs"),
        ({"messages": [{"role": "", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "a<|end|>", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user\n", "content": "x"}]}, "messages[0].role"),
        ({"prompt": "hi", "logit_bias": {"5": 1, "05": -1}}, "logit_bias"),
        ({"messages": HI, "use_beam_search": 0}, "use_beam_search"),
        ({"messages": HI, "length_penalty": True}, "length_penalty"),
    ],
)
async def test_rules_of_single_fields(body, param):
    path = KINDS["chat" if "messages" in body else "completion"][0]
    async with gateway(MODEL) as rig:
        answer = await rig.client.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@async_test
async def test_what_clients_send_without_meaning_it():
    async with gateway(MODEL) as rig:
        post = rig.client.post
        harmless = {"model": "", "top_logprobs": 0, "tools": [TOOL], "tool_choice": "none", "temperature": 2}
        answer = await rig.chat("hi", max_tokens=1, response_format={"type": "text"}, **harmless)
        wizard = await post(KINDS["chat"][0], json={"messages": [{"role": "ipython", "content": "x"}], "max_tokens": 1})
    assert answer.status_code == wizard.status_code == 200


@async_test
async def test_integers_may_be_written_as_floats():
    body = b'{"prompt": [1.0, 2], "max_tokens": 4.0, "n": 2.0, "seed": 7.0, "top_k": 40.0, "stop_token_ids": [9.0]}'
    async with gateway(MODEL) as rig:
        answer = await rig.client.post("/v1/completions", content=body)
        half = await rig.client.post("/v1/completions", content=b'{"prompt": [1, 2], "max_tokens": 4.5}')
        number = await rig.client.post("/v1/completions", content=b"4.0")
        text = await rig.client.post("/v1/completions", content=b'{"prompt": [1, 2], "max_tokens": "4"}')
        first, *_ = rig.worker.submits()
    assert answer.status_code == 200
    assert (first.prompt_ids, first.sampling.max_tokens, first.sampling.seed, first.sampling.top_k) == (
        [1, 2],
        4,
        7,
        40,
    )
    assert 9 in first.sampling.stop_token_ids
    assert (half.status_code, half.json()["error"]["param"]) == (400, "max_tokens")
    assert (text.status_code, text.json()["error"]["param"]) == (400, "max_tokens")
    assert number.status_code == 400


@async_test
async def test_special_tokens_are_shown_where_that_is_asked_for():
    start, end = (TOKENIZER.encode(text)[0] for text in ("<|start|>", "<|end|>"))
    hello = TOKENIZER.encode("hello")
    script = [start, *hello, start, end]
    async with gateway(MODEL) as rig:
        rig.worker.script = lambda prompt_ids, idx: script[idx]
        hidden = (await rig.complete("x", logprobs=0)).json()["choices"][0]
        shown = (await rig.complete("x", logprobs=0, skip_special_tokens=False)).json()["choices"][0]
        stream = events((await rig.complete("x", skip_special_tokens=False, stream=True)).text)
        chat = (await rig.chat(logprobs=True, skip_special_tokens=False)).json()["choices"][0]
    assert (hidden["text"], hidden["logprobs"]["text_offset"]) == ("hello", [0, 0, 5, 5])
    assert shown["text"] == text_of(stream) == chat["message"]["content"] == "<|start|>hello<|start|>"
    assert shown["logprobs"]["text_offset"] == [0, 9, 14, 23]
    assert b"".join(bytes(entry["bytes"]) for entry in chat["logprobs"]["content"][:-1]).decode() == shown["text"]


@async_test
async def test_tokens_named_by_their_ids():
    (hello,) = TOKENIZER.encode("hello")
    async with gateway(MODEL) as rig:
        rig.worker.script = saying(MODEL, "hello")
        fields = {"max_tokens": 1, "return_tokens_as_token_ids": True}
        completion = (await rig.complete("x", logprobs=2, **fields)).json()["choices"][0]["logprobs"]
        chat = (await rig.chat(logprobs=True, top_logprobs=1, **fields)).json()["choices"][0]["logprobs"]["content"][0]
    async with gateway(ids_model()) as rig:
        bare = (await rig.complete([1, 2], logprobs=0, **fields)).json()["choices"][0]["logprobs"]["tokens"]
    name = f"token_id:{hello}"
    assert completion["tokens"] == [name]
    assert completion["top_logprobs"] == [{name: -0.5, f"token_id:{hello + 1}": -1.5}]
    assert (chat["token"], chat["top_logprobs"][0]["token"], bytes(chat["bytes"])) == (name, name, b"hello")
    assert bare[0].startswith("token_id:")


TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if mode %}{{ mode }}{% endif %}{% if tools %}{{ tools | length }} tools{% endif %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
PREFILLED = [*HI, {"role": "assistant", "content": " The answer is "}]


def model_with(template):
    return replace(MODEL, template=ChatTemplate({"default": template}))


@async_test
@pytest.mark.parametrize("explicit", [{}, {"add_generation_prompt": False}])
async def test_an_answer_goes_on_with_the_last_message(explicit):
    body = {"messages": PREFILLED, "continue_final_message": True, **explicit}
    async with gateway(model_with(TEMPLATE)) as rig:
        rig.worker.script = saying(MODEL, "hello")
        answer = (await rig.client.post("/v1/chat/completions", json=body)).json()
        counted = (await rig.client.post("/tokenize", json=body)).json()
        (submit,) = rig.worker.submits()
    prompt = "<|start|>user\nhi<|end|>\n<|start|>assistant\nThe answer is "
    assert TOKENIZER.decode(submit.prompt_ids, skip_special_tokens=False) == prompt
    assert answer["choices"][0]["message"]["content"] == "hello"
    assert counted["tokens"] == submit.prompt_ids


@async_test
async def test_what_cannot_go_on_is_refused():
    async with gateway(
        model_with("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}")
    ) as rig:
        for messages, fields in (
            (PREFILLED, {}),  # this template leaves it out
            (PREFILLED, {"add_generation_prompt": True}),
            ([*HI, {"role": "assistant", "content": None}], {}),
            ([*HI, {"role": "assistant", "content": ""}], {}),
        ):
            body = {"messages": messages, "continue_final_message": True, **fields}
            answer = await rig.client.post("/v1/chat/completions", json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "continue_final_message")


@async_test
async def test_tokenize_counts_what_chat_would_send():
    fields = {"messages": HI, "chat_template_kwargs": {"mode": "fast"}, "tools": [TOOL], "add_special_tokens": True}
    async with gateway(model_with(TEMPLATE)) as rig:
        counted = (await rig.client.post("/tokenize", json=fields)).json()
        await rig.client.post("/v1/chat/completions", json={**fields, "tool_choice": "none", "max_tokens": 1})
        (submit,) = rig.worker.submits()
    assert counted["tokens"] == submit.prompt_ids
    assert "fast1 tools" in TOKENIZER.decode(submit.prompt_ids, skip_special_tokens=False)
