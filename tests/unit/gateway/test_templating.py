"""Chat templates: rendering, refusals, the sandbox."""

import pytest

from afd.errors import ModelError, RequestError
from afd.gateway.templating import ChatTemplate

HI = [{"role": "user", "content": "hi"}]


def test_what_templates_use():
    template = ChatTemplate(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
        "{{ m | tojson }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}{{ mood }}",
        bos_token="<s>",
    )
    messages = [*HI, {"role": "tool", "content": "x"}, {"role": "user", "content": "日"}]
    assert template.render(messages, extra={"mood": "!"}) == (
        '<s>{"role": "user", "content": "hi"}\n{"role": "user", "content": "日"}\n>!'
    )
    assert template.render(HI, add_generation_prompt=False).endswith("}\n")


def test_the_clients_variables_do_not_replace_the_messages():
    template = ChatTemplate("{{ bos_token }}{{ messages[0].content }}", bos_token="B")
    assert template.render(HI, extra={"messages": [], "bos_token": "evil"}) == "Bhi"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 // 0 }}",
        "{{ messages.missing.deeper }}",
    ],
)
def test_a_refusal_is_the_clients_error(source):
    with pytest.raises(RequestError) as error:
        ChatTemplate(source).render(HI)
    assert error.value.param == "messages"


def test_values_too_deep_to_be_written_are_a_refusal():
    deep = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(RequestError):
        ChatTemplate("{{ messages | tojson }}").render([{"role": "user", "content": "hi", "tool_calls": deep}])


@pytest.mark.parametrize("source", ["{{ messages.__class__.__mro__ }}", "{{ ''.__class__.__subclasses__() }}"])
def test_the_sandbox_holds(source):
    with pytest.raises(RequestError):
        ChatTemplate(source + "{{ messages.__class__.__init__.__globals__ }}").render(HI)


def test_messages_cannot_be_changed():
    with pytest.raises(RequestError):
        ChatTemplate("{{ messages.append(1) }}").render(HI)


def test_a_broken_template_is_the_models_error():
    with pytest.raises(ModelError, match="not valid Jinja"):
        ChatTemplate("{% for %}")
