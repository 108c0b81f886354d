"""`afd chat` against a real gateway."""

import asyncio
import io
import json

import httpx
import pytest

from afd.gateway.chat_client import ChatError, Conversation, run_chat
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
async def test_an_answer_cannot_speak_to_the_terminal():
    async with served_gateway(MODEL) as rig:
        rig.worker.script = saying(MODEL, "a\tb\nc\x1b]0;title\x07\x9b2J\r日本")
        code, printed = await chat(rig.url, ["hi"])
    assert code == 0
    assert "a\tb\nc\\x1b]0;title\\x07\\x9b2J\\r日本" in printed


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


@async_test
async def test_sampling_flags_are_sent_and_nothing_else(tmp_path):
    async with served_gateway(MODEL) as rig:
        rig.worker.script = saying(MODEL, "fine")
        await chat(rig.url, ["hi"])
        await chat(rig.url, ["hi"], sampling={"temperature": 0.5, "top_p": 0.25, "max_tokens": 7})
        plain, asked = rig.worker.submits()
    assert (asked.sampling.temperature, asked.sampling.top_p, asked.sampling.max_tokens) == (0.5, 0.25, 7)
    assert plain.sampling.temperature != 0.5 and plain.sampling.max_tokens != 7


@async_test
@pytest.mark.parametrize("key", ["the-key", "schlüssel-日本"])
async def test_keys(tmp_path, key):
    keys = tmp_path / "keys.txt"
    keys.write_text(f"# clients\n\n{key}\n", encoding="utf-8")
    async with served_gateway(MODEL, limits={"api_keys_file": str(keys)}) as rig:
        rig.worker.script = saying(MODEL, "fine")
        code, printed = await chat(rig.url, ["hi"], api_key=key)
        assert code == 0 and "fine" in printed
        for wrong in ("", "another"):
            code, printed = await chat(rig.url, ["hi"], api_key=wrong)
            assert code == 1 and "--api-key-file" in printed and "AFD_API_KEY" in printed


@async_test
async def test_an_unknown_command_is_called_unknown_and_not_sent():
    async with served_gateway(MODEL) as rig:
        _, printed = await chat(rig.url, ["/temperature 0", "/resett"])
        assert rig.worker.submits() == []
    assert "unknown command /temperature" in printed and "unknown command /resett" in printed


@async_test
@pytest.mark.parametrize("url", ["http://[", "127.0.0.1:1", "http://127.0.0.1:99999999", "nonsense"])
async def test_urls_that_are_none(url):
    code, printed = await chat(url, [])
    assert code == 1 and printed.startswith("afd chat: ") and len(printed.splitlines()) == 1


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_what_unicode_takes_for_the_end_of_a_line_is_text(size):
    text = "one\u2028two\u2029three\x85four\nfive\r\nsix 日本"
    event = json.dumps({"choices": [{"delta": {"content": text}}]}, ensure_ascii=False).encode()
    stream = b": keep-alive\n\ndata: " + event + b"\r\n\r\ndata: " + event + b"\n\ndata: [DONE]\n\n"
    chunks = [stream[i : i + size] for i in range(0, len(stream), size)]
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=iter(chunks)))
    with httpx.Client(transport=transport, base_url="http://gateway") as client:
        assert list(Conversation(client, "m").ask("hi")) == [text, text]


def test_an_event_that_is_no_json_is_the_servers_fault():
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=b"data: {\n\n"))
    client = httpx.Client(transport=transport, base_url="http://gateway")
    with client, pytest.raises(ChatError, match="no JSON"):
        list(Conversation(client, "m").ask("hi"))
