"""Whatever a template does when it is tried costs a bounded time, in another process, and is said in one line."""

import os
import time

import pytest

from afd.errors import ModelError
from afd.gateway.template_check import check_template


@pytest.mark.parametrize(
    "source",
    [
        "{{ bos_token }}{{ messages[0].content }}",
        "",
        "{{ raise_exception('a system message first') }}",
        "{{ 'a' * 10 ** 9 }}",
    ],
)
def test_a_usable_template(source):
    """One that refuses the sample may take other conversations."""
    check_template({"default": source}, {"bos_token": "B"})


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for %}", "is not valid Jinja"),
        ("{{" + "(" * 20_000, "is not valid Jinja"),
        ("{% for i in range(99999) %}" + "x" * 100 + "{% endfor %}", "more than 1048576 characters"),
    ],
)
def test_one_that_no_conversation_can_use(source, reason):
    with pytest.raises(ModelError, match=reason):
        check_template({"default": source}, {})


@pytest.mark.parametrize(
    "bomb",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ (messages | length * 10) ** 40000000 }}",
        "{{ 10 ** 400000000 }}",
        "{{ lipsum(n=10 ** 6) }}",
    ],
)
def test_one_that_does_not_end(bomb):
    begun_at = time.monotonic()
    with pytest.raises(ModelError, match="does not come to an end within 1 s"):
        check_template({"default": bomb}, {}, timeout_s=1.0)
    assert time.monotonic() - begun_at < 30


def test_no_process_is_left():
    def children():
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return set(file.read().split())

    before = children()
    check_template({"default": "x"}, {})
    assert children() <= before
