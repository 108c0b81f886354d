"""`afd chat` against a real gateway."""

import asyncio
import io

import pytest

from afd.gateway.chat_client import run_chat
from tests.fakes.async_test import async_test
from tests.fakes.gateway import saying, served_gateway
from tests.fakes.text_model import text_model

MODEL = text_model()


async def chat(url, lines, **options):
    """(exit code, what was printed) of a conversation with these lines typed."""
    out, typed = io.StringIO(), iter(lines)

    def read_line(prompt):
        line = next(typed, None)
        if line is None:
            raise EOFError
        if isinstance(line, type):
            raise line
        return line

    code = await asyncio.to_thread(run_chat, url, read_line=read_line, out=out, **options)
    return code, out.getvalue()


def prompts(rig):
    return [MODEL.tokenizer.decode(s.prompt_ids, skip_special_tokens=False) for s in rig.worker.submits()]


@async_test
async def test_a_conversation():
    async with served_gateway(MODEL) as rig:
        rig.worker.script = saying(MODEL, "hello 日本")
        code, printed = await chat(
            rig.url, ["hi", "", "/help", "again", "/reset", "/system be brief", "anew"], system="be kind"
        )
        first, second, third = prompts(rig)
    assert code == 0
    assert printed.count("hello 日本") == 3
    assert "tiny at http" in printed
    assert first == "<|start|>system\nbe kind<|end|>\n<|start|>user\nhi<|end|>\n<|start|>assistant\n"
    assert "<|start|>assistant\nhello 日本<|end|>\n<|start|>user\nagain<|end|>" in second
    assert third == "<|start|>system\nbe brief<|end|>\n<|start|>user\nanew<|end|>\n<|start|>assistant\n"


@async_test
async def test_errors_are_shown_and_the_talk_goes_on():
    async with served_gateway(MODEL) as rig:
        rig.worker.script = saying(MODEL, "fine")
        rig.worker.fail_at = (0, "NaN in layer 3", False)

        def read_and_heal():
            yield "hi"
            rig.worker.fail_at = None
            yield "hi again"

        code, printed = await chat(rig.url, read_and_heal())
    assert code == 0
    assert "error: attention worker 0: NaN in layer 3" in printed
    assert "fine" in printed


@async_test
@pytest.mark.parametrize("ending", ["/exit", "/quit", KeyboardInterrupt])
async def test_ways_to_leave(ending):
    async with served_gateway(MODEL) as rig:
        code, _ = await chat(rig.url, [ending, "never asked"])
        assert rig.worker.submits() == []
    assert code == 0


@async_test
async def test_nobody_there():
    code, printed = await chat("http://127.0.0.1:1", [])
    assert code == 1
    assert "cannot reach" in printed
