"""Templates in their own process: whatever they do costs the request that ran them, for a bounded time."""

import contextlib
import gc
import os
import signal
import threading
import time

import pytest

from afd.errors import ModelError, RequestError, UnavailableError
from afd.gateway.template_process import TemplateProcess

ECHO = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ tools }}{{ mood }}"
FOR_EVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@contextlib.contextmanager
def process(source, render_s=20.0):
    with contextlib.closing(TemplateProcess({"default": source}, {"bos_token": "B"}, render_s=render_s)) as template:
        yield template


def say(template, text, **options):
    return template.render([{"role": "user", "content": text}], max_chars=1_000_000, **options)


def test_it_renders_like_the_template_itself():
    with process(ECHO) as template:
        template.check()
        assert say(template, "日\n") == "B日\nNone"
        assert say(template, "x", tools=[{"a": 1}], extra={"mood": "!", "bos_token": "no"}) == "Bx[{'a': 1}]!"
        assert say(template, "y" * 900_000) == "B" + "y" * 900_000 + "None"


def test_refusals_come_through():
    with process("{{ raise_exception('roles must alternate') }}") as template:
        template.check()  # a lone message may be refused: that is no fault of the template
        with pytest.raises(RequestError, match="roles must alternate") as error:
            say(template, "x")
        assert error.value.param == "messages"


@pytest.mark.parametrize("source", ["{% for %}", "{% for i in range(99999) %}" + "x" * 100 + "{% endfor %}"])
def test_check_refuses_what_no_conversation_can_use(source):
    with process(source) as template, pytest.raises(ModelError):
        template.check()


@pytest.mark.parametrize(
    "bomb",
    [
        FOR_EVER,
        "{{ (messages | length * 10) ** 40000000 }}",
        "{{ messages | tojson(indent=10 ** 9) }}",
        "{{ 'a' * (messages | length * 10 ** 9) }}",
        "{{ 'a'.center(messages | length * 10 ** 9) }}",
        "{{ lipsum(n=10 ** 6) }}",
    ],
)
def test_a_bomb_ends_and_the_next_request_is_served(bomb):
    with process("{% if messages[0].content == 'bomb' %}" + bomb + "{% endif %}ok", render_s=3.0) as template:
        template.check()
        begun_at = time.monotonic()
        with pytest.raises(RequestError) as error:
            say(template, "bomb")
        assert error.value.param == "messages"
        assert time.monotonic() - begun_at < 30
        assert say(template, "fine") == "ok"


def test_others_wait_for_a_bounded_time():
    with process("{% if messages[0].content == 'bomb' %}" + FOR_EVER + "{% endif %}ok", render_s=2.0) as template:
        template.check()
        outcomes = []

        def ask():
            with contextlib.suppress(RequestError, UnavailableError):
                outcomes.append(say(template, "bomb"))
            outcomes.append("ended")

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert outcomes == ["ended"] * 4
        assert say(template, "fine") == "ok"


def test_a_child_that_died_meanwhile_is_replaced():
    with process("{{ messages[0].content }}") as template:
        assert say(template, "a") == "a"
        children = [pid for pid in _children() if _is_renderer(pid)]
        assert children
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        assert say(template, "b") == "b"


def test_close_ends_the_child():
    before = set(_children())
    with process(ECHO) as template:
        template.check()
        assert set(_children()) - before
    gc.collect()
    assert set(_children()) == before
    with pytest.raises(UnavailableError):
        say(template, "x")


def _children():
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]


def _is_renderer(pid):
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline") as file:
        return "template_process" in file.read()
    return False
