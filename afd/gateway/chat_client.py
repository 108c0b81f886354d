"""`afd chat`: a conversation in the terminal, over the public API like any other client."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

import httpx

HELP = "/reset forgets the conversation, /system TEXT sets the system prompt, /exit leaves; Ctrl-C stops an answer"
CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 120.0
# What a model may not tell the terminal; spaces and joiners of all scripts may pass.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class ChatError(Exception):
    """The server refused or broke off; its message is for the user."""


@dataclass
class Conversation:
    """Messages so far, and how to get the next one."""

    client: httpx.Client
    model: str
    system: str | None = None
    sampling: dict[str, float] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)

    def reset(self) -> None:
        self.messages.clear()

    def ask(self, text: str) -> Iterator[str]:
        """Send a user's message, yield the answer's pieces. An answer cut short is kept as far as it came."""
        self.messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            for piece in self._stream():
                pieces.append(piece)
                yield piece
        finally:
            if pieces:
                self.messages.append({"role": "assistant", "content": "".join(pieces)})
            else:
                self.messages.pop()

    def _stream(self) -> Iterator[str]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        body = {"model": self.model, "messages": system + self.messages, "stream": True, **self.sampling}
        try:
            with self.client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != httpx.codes.OK:
                    response.read()
                    raise ChatError(_error_text(response))
                for line in _lines(response.iter_bytes()):
                    if line.startswith(b"data: ") and line != b"data: [DONE]":
                        yield from _pieces(json.loads(line[6:]))
        except ValueError as error:
            raise ChatError(f"{self.client.base_url} sent an event that is no JSON: {error}") from error
        except httpx.HTTPError as error:
            raise ChatError(f"connection to {self.client.base_url} failed: {error}") from error


def run_chat(
    url: str,
    model: str | None = None,
    system: str | None = None,
    *,
    api_key: str | None = None,
    sampling: dict[str, float] | None = None,
    read_line: Callable[[str], str] = input,
    out: TextIO | None = None,
) -> int:
    """Talk until end of input. Exit code: 0, or 1 when the server cannot be reached.

    model: None = the one that the server serves.
    sampling: fields of every request.
    read_line, out: the terminal, replaceable in tests.
    """
    out = out if out is not None else sys.stdout
    headers = {b"authorization": f"Bearer {api_key}".encode()} if api_key else {}
    timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    try:
        client = httpx.Client(base_url=url, headers=headers, timeout=timeout)
    except httpx.InvalidURL as error:
        print(f"afd chat: {url}: {error}", file=out)
        return 1
    with client:
        try:
            conversation = Conversation(client, model or _served_model(client), system, sampling or {})
        except ChatError as error:
            print(f"afd chat: {error}", file=out)
            return 1
        print(f"{conversation.model} at {url}. {HELP}.", file=out)
        with contextlib.suppress(EOFError):
            while _turn(conversation, read_line, out):
                pass
    return 0


def _turn(conversation: Conversation, read_line: Callable[[str], str], out: TextIO) -> bool:
    """One line of the user's. False = leave."""
    try:
        text = read_line("> ").strip()
    except KeyboardInterrupt:
        print(file=out)
        return False
    command, _, argument = text.partition(" ")
    if command in ("/exit", "/quit"):
        return False
    if command == "/reset":
        conversation.reset()
    elif command == "/system":
        conversation.system = argument or None
    elif command == "/help":
        print(HELP, file=out)
    elif command.startswith("/"):
        print(f"unknown command {command}; {HELP}", file=out)
    elif text:
        _answer(conversation, text, out)
    return True


def _answer(conversation: Conversation, text: str, out: TextIO) -> None:
    begun_at = time.perf_counter()
    first_at, num_pieces = begun_at, 0
    try:
        for piece in conversation.ask(text):
            if num_pieces == 0:
                first_at = time.perf_counter()
            num_pieces += 1
            print(_CONTROL.sub(_escaped, piece), end="", flush=True, file=out)
    except KeyboardInterrupt:
        print("\n(stopped)", end="", file=out)
    except ChatError as error:
        print(f"\nerror: {_CONTROL.sub(_escaped, str(error))}", end="", file=out)
    print(file=out)
    if num_pieces > 1:
        per_piece_ms = (time.perf_counter() - first_at) / (num_pieces - 1) * 1e3
        print(f"[first token {(first_at - begun_at) * 1e3:.0f} ms, then {per_piece_ms:.1f} ms each]", file=out)


def _served_model(client: httpx.Client) -> str:
    try:
        response = client.get("/v1/models")
    except httpx.HTTPError as error:
        raise ChatError(f"cannot reach {client.base_url}: {error}; is `afd up` running?") from error
    if response.status_code != httpx.codes.OK:
        raise ChatError(_error_text(response))
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        raise ChatError(f"{client.base_url} does not answer like an OpenAI-compatible server") from error


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The whole lines of an event stream. A text may hold what else Unicode takes for the end of a line."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.removesuffix(b"\r") for line in lines)


def _pieces(event: dict[str, Any]) -> Iterator[str]:
    if "error" in event:
        raise ChatError(str(event["error"].get("message", event["error"])))
    for choice in event.get("choices", []):
        content = choice.get("delta", {}).get("content")
        if content:
            yield content


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def _error_text(response: httpx.Response) -> str:
    try:
        text = str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        text = f"HTTP {response.status_code}"
    if response.status_code == httpx.codes.UNAUTHORIZED:
        text += "; give one with --api-key-file FILE or in $AFD_API_KEY"
    return text
