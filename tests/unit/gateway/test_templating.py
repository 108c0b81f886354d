"""Chat templates: rendering, refusals, the sandbox, bounds."""

import pytest

from afd.errors import RequestError
from afd.gateway.templating import ChatTemplate

HI = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "get"}}]


def render(source, messages=HI, special_tokens=None, max_chars=10_000, **options):
    template = ChatTemplate({"default": source}, special_tokens)
    return template.render(messages, max_chars=max_chars, **options)


def test_what_templates_use():
    source = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
        "{{ m | tojson }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}{{ mood }}"
    )
    messages = [*HI, {"role": "tool", "content": "x"}, {"role": "user", "content": "日"}]
    assert render(source, messages, {"bos_token": "<s>"}, extra={"mood": "!"}) == (
        '<s>{"role": "user", "content": "hi"}\n{"role": "user", "content": "日"}\n>!'
    )
    assert render(source, add_generation_prompt=False).endswith("}\n")


def test_the_clients_variables_do_not_replace_ours():
    extra = {"messages": [], "bos_token": "evil", "tools": [1], "add_generation_prompt": 0, "self": "x", "mine": "y"}
    source = "{{ bos_token }}{{ messages[0].content }}{{ tools }}{{ add_generation_prompt }}{{ mine }}"
    assert render(source, special_tokens={"bos_token": "B"}, extra=extra) == "BhiNoneTruey"


def test_a_token_that_the_model_has_not_is_undefined():
    assert render("{{ bos_token is defined }}{{ pad_token }}", special_tokens={"pad_token": "P"}) == "FalseP"


def test_reasoning_has_every_name_that_templates_know():
    source = "{{ messages[0].reasoning_content }}{{ messages[0].thinking }}"
    for name in ("reasoning", "reasoning_content", "thinking"):
        assert render(source, [{"role": "assistant", "content": None, name: "r"}]) == "rr"
    assert render("{{ messages[0].content is defined }}", [{"role": "assistant", "content": None}]) == "False"


def test_a_template_for_tools_is_used_with_tools():
    template = ChatTemplate({"default": "D", "tool_use": "T{{ tools | length }}", "rag": "R"})
    assert template.render(HI, max_chars=9) == "D"
    assert template.render(HI, max_chars=9, tools=TOOLS) == "T1"
    assert ChatTemplate({"default": "D{{ tools | length }}"}).render(HI, max_chars=9, tools=TOOLS) == "D1"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 // 0 }}",
        "{{ messages.missing.deeper }}",
        "{{ '\\ud800' }}",
        "{{ namespace(_x=1) }}",
        "{{ strftime_now(1) }}",
        "{{ 'a'.encode('none') }}",
    ],
)
def test_a_refusal_is_the_clients_error(source):
    with pytest.raises(RequestError, match="refuses these messages") as error:
        render(source)
    assert error.value.param == "messages" and error.value.status == 400


def test_values_too_deep_to_be_written_are_a_refusal():
    deep = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(RequestError):
        render("{{ messages | tojson }}", [{"role": "user", "content": "hi", "tool_calls": deep}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__.x }}",
        "{{ ''.__class__.__subclasses__() }}",
        "{{ dict.__call__.__globals__.x }}",
        "{{ namespace.__init__.__globals__.x }}",
        "{{ raise_exception.__globals__.x }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ dict.mro() }}",
    ],
)
def test_the_sandbox_holds(source):
    with pytest.raises(RequestError):
        render(source)


def test_messages_cannot_be_changed():
    with pytest.raises(RequestError):
        render("{{ messages.append(1) }}")


def test_a_text_that_cannot_fit_is_refused_while_it_is_made():
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}abcdefgh{% endfor %}{% endfor %}"
    with pytest.raises(RequestError) as error:
        render(endless, max_chars=1000)
    assert error.value.code == "context_length_exceeded"
    assert render("abcd", max_chars=4) == "abcd"


def test_a_long_reason_is_cut():
    with pytest.raises(RequestError) as error:
        render("{{ raise_exception('x' * 100000) }}")
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("source", ["{% for %}", "{% nothing %}", "{{" + "(" * 20_000, "{{ 'a' | none }}"])
def test_a_broken_template_is_refused_on_use_with_the_reason(source):
    with pytest.raises(RequestError, match=r"not valid Jinja: .+; /v1/completions works") as error:
        render(source)
    assert error.value.code == "bad_chat_template"


def test_a_broken_template_for_tools_leaves_the_other_alone():
    template = ChatTemplate({"default": "D", "tool_use": "{% for %}"})
    assert template.render(HI, max_chars=9) == "D"
    with pytest.raises(RequestError, match="chat template 'tool_use' is not valid"):
        template.render(HI, max_chars=9, tools=TOOLS)


def test_templates_without_a_default_one():
    with pytest.raises(RequestError, match="is missing: there are only those named rag") as error:
        ChatTemplate({"rag": "R"}).render(HI, max_chars=9)
    assert error.value.code == "bad_chat_template"
