"""From a request's messages to what templates read: tool calls of the history, reasoning, content."""

import dataclasses
import json

import pytest

from afd.errors import RequestError
from afd.gateway.api.parameters import template_messages
from afd.gateway.api.schema import chat_decoder
from afd.gateway.templating import ChatTemplate
from tests.fakes.text_model import text_model


def read(*messages):
    body = chat_decoder.decode(json.dumps({"messages": messages}).encode())
    return template_messages(body.messages)


def call(arguments, **fields):
    return {"role": "assistant", "content": None, "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "get", "arguments": arguments}, **fields}]}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"city": "Paris", "n": [1, 2.5, null]}', {"city": "Paris", "n": [1, 2.5, None]}),
        ({"city": "Paris"}, {"city": "Paris"}),
        ("{}", {}),
        ("", {}),
        (None, {}),
        ("{'city': 1}", {}),
        ("[1]", {}),
        ("42", {}),
        ("[" * 100_000, {}),
    ],
)
def test_arguments_are_a_mapping(arguments, expected):
    (message,) = read(call(arguments))
    assert message["tool_calls"] == [
        {"id": "1", "type": "function", "function": {"name": "get", "arguments": expected}}
    ]
    assert message["content"] == ""


def test_a_template_that_iterates_arguments():
    source = "{% for c in messages[1].tool_calls %}{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}"
    source += "{% endfor %}{{ c.function.arguments | tojson }}{% endfor %}"
    history = read(
        {"role": "user", "content": "Weather?"},
        call('{"city": "Paris"}'),
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
        {"role": "user", "content": "So?"},
    )
    assert ChatTemplate({"default": source}).render(history, max_chars=99) == 'city=Paris{"city": "Paris"}'
    assert history[2] == {"role": "tool", "tool_call_id": "1", "content": "sunny"}


@pytest.mark.parametrize("fields", [{"type": "custom"}, {"function": "get"}, {"function": None}])
def test_calls_that_are_no_functions_are_refused_by_name(fields):
    with pytest.raises(RequestError, match="type 'function'") as error:
        read({"role": "user", "content": "x"}, call("{}", **fields))
    assert error.value.param == "messages[1].tool_calls[0]"


def test_no_calls_are_as_no_key():
    (message,) = read({"role": "assistant", "content": "x", "tool_calls": []})
    assert "tool_calls" not in message


def test_reasoning_under_either_name():
    for name in ("reasoning", "reasoning_content"):
        (message,) = read({"role": "assistant", "content": "x", name: "because"})
        assert message == {
            "role": "assistant", "content": "x", "reasoning": "because", "reasoning_content": "because"
        }  # fmt: skip


def test_a_model_whose_template_is_broken_says_so():
    model = dataclasses.replace(text_model(), template=None, template_problem="the model's chat template is not valid")
    with pytest.raises(RequestError, match="is not valid") as error:
        model.need_template()
    assert error.value.code == "bad_chat_template"
