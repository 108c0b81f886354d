"""One streamed completion, timed: request body, SSE chunks, outcome. Works with any OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from afd.load.http1 import ConnectError, DisconnectError, HttpClient, ProtocolError
from afd.load.record import Outcome, RequestRecord
from afd.load.sse import SseError, SseParser
from afd.load.workload import Prompt

Endpoint = Literal["completions", "chat"]
_PATHS: dict[Endpoint, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
_REFUSALS = (429, 503)
MAX_ERROR_BYTES = 64 << 10
MAX_ERROR_CHARS = 300


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[msgspec.Raw] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None  # completions
    delta: _Delta | None = None  # chat
    token_ids: list[int] | None = None
    finish_reason: str | None = None

    def bears_tokens(self) -> bool:
        """False for chunks that only open (role) or only close (finish reason) the answer.

        A chunk without text in the middle counts: it is a token that ends inside a character.
        """
        if self.token_ids or self.text:
            return True
        delta = self.delta
        if delta is None:
            return self.finish_reason is None
        if delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls:
            return True
        return delta.role is None and self.finish_reason is None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = msgspec.field(default_factory=list)
    usage: _Usage | None = None
    error: Any = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


@dataclass(frozen=True, slots=True)
class CompletionSettings:
    """Settings that all requests of a run share."""

    model: str
    endpoint: Endpoint = "completions"
    temperature: float = 0.0
    ignore_eos: bool = True
    timeout_s: float = 600.0
    keep_texts: bool = False

    @property
    def path(self) -> str:
        return _PATHS[self.endpoint]

    def encode(self, prompt: Prompt) -> bytes:
        """The JSON body. Done before the run starts, so that it costs nothing while times are taken."""
        body: dict[str, Any] = {"model": self.model, "temperature": self.temperature, "stream": True}
        body["stream_options"] = {"include_usage": True}
        if self.ignore_eos:
            body["ignore_eos"] = True
        if self.endpoint == "chat":
            body["messages"] = prompt.content
            body["max_completion_tokens"] = prompt.output_len
        else:
            body["prompt"] = prompt.content
            body["max_tokens"] = prompt.output_len
        return msgspec.json.encode(body)


async def complete(client: HttpClient, settings: CompletionSettings, body: bytes, record: RequestRecord) -> None:
    """Send one request and fill its record. Raises nothing but CancelledError, which marks it INTERRUPTED."""
    sink = _CompletionSink(record)
    record.start_s = time.perf_counter()
    try:
        async with asyncio.timeout(settings.timeout_s):
            await client.post(settings.path, body, sink)
    except TimeoutError:
        sink.fail(Outcome.TIMEOUT, f"no complete answer within {settings.timeout_s:g} s")
    except asyncio.CancelledError:
        sink.fail(Outcome.INTERRUPTED, "interrupted")
        raise
    except ConnectError as error:
        sink.fail(Outcome.CONNECT_FAILED, str(error))
    except DisconnectError as error:
        sink.fail(Outcome.DISCONNECTED, str(error))
    except ProtocolError as error:
        sink.fail(Outcome.PROTOCOL_ERROR, str(error))
    else:
        sink.finish()


class _CompletionSink:
    """Turns the body of one answer into its record."""

    def __init__(self, record: RequestRecord):
        self._record = record
        self._sse: SseParser | None = None
        self._body = bytearray()  # of an answer that is no event stream
        self._finished_s: float | None = None  # the last chunk with a finish reason
        self._num_usage_tokens: int | None = None
        self._done = False

    # --- Sink -------------------------------------------------------------------------------------------

    def on_response(self, status: int, headers: dict[str, str]) -> None:
        self._record.status = status
        if status != 200:
            self._record.retry_after_s = _retry_after(headers.get("retry-after"))
            return
        content_type = headers.get("content-type", "")
        if not content_type.startswith("text/event-stream"):
            raise ProtocolError(f"the server answered with {content_type or 'no content type'}, not an event stream")
        self._sse = SseParser()

    def on_body(self, data: bytes, now: float) -> None:
        if self._sse is None:
            self._body += data[: MAX_ERROR_BYTES - len(self._body)]
            return
        try:
            for payload in self._sse.feed(data):
                self._on_event(payload, now)
        except SseError as error:
            raise ProtocolError(str(error)) from None

    def _on_event(self, payload: bytes, now: float) -> None:
        if self._done:
            return
        record = self._record
        record.end_s = now
        if payload == b"[DONE]":
            self._done = True
            return
        try:
            chunk = _decode_chunk(payload)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ProtocolError(f"an event is no chunk of a completion: {error}") from None
        if chunk.error is not None:
            record.outcome = Outcome.STREAM_ERROR
            record.error = _error_message(payload)
        for choice in chunk.choices:
            if choice.bears_tokens():
                record.token_times.append(now)
            if choice.finish_reason is not None:
                self._finished_s = now
            if record.texts is not None:
                record.texts.append(_text(choice))
        if chunk.usage is not None:
            self._on_usage(chunk.usage)

    def _on_usage(self, usage: _Usage) -> None:
        self._num_usage_tokens = usage.completion_tokens
        if usage.prompt_tokens:
            self._record.num_prompt_tokens = usage.prompt_tokens
        if usage.prompt_tokens_details is not None:
            self._record.num_cached_tokens = usage.prompt_tokens_details.cached_tokens or 0

    # --- ends -------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """The HTTP exchange is over: judge what it brought."""
        record = self._record
        if record.status != 200:
            refused = record.status in _REFUSALS
            message = _error_message(bytes(self._body)) or "no message"
            self.fail(Outcome.REFUSED if refused else Outcome.HTTP_ERROR, f"HTTP {record.status}: {message}")
        elif record.outcome is Outcome.STREAM_ERROR:
            self._count_tokens()
        elif not self._done and self._finished_s is None:
            self.fail(Outcome.DISCONNECTED, "the stream ended without a finish reason and without [DONE]")
        else:
            if self._finished_s is not None:
                record.end_s = self._finished_s
            self._count_tokens()
            record.outcome = Outcome.COMPLETED

    def fail(self, outcome: Outcome, error: str) -> None:
        """The request ends here and now. An error event that came before is the better explanation."""
        record = self._record
        record.end_s = time.perf_counter()
        self._count_tokens()
        if record.outcome is Outcome.PENDING:
            record.outcome = outcome
            record.error = error[:MAX_ERROR_CHARS]

    def _count_tokens(self) -> None:
        record = self._record
        times = record.token_times
        if self._num_usage_tokens is None:
            record.num_output_tokens = len(times)
            return
        record.num_output_tokens = self._num_usage_tokens
        finished_s = self._finished_s
        if self._num_usage_tokens > len(times) and finished_s is not None and not (times and times[-1] >= finished_s):
            # Tokens that show no text (an end token, half a character) came with the chunk that closed the answer.
            times.append(finished_s)


def _text(choice: _Choice) -> str:
    if choice.delta is not None:
        return choice.delta.content or ""
    return choice.text or ""


def _retry_after(value: str | None) -> float | None:
    """Seconds; the header's date form is not evaluated."""
    try:
        return max(0.0, float(value)) if value is not None else None
    except ValueError:
        return None


def _error_message(payload: bytes) -> str:
    """What an error body says: {"error": {"message"}}, {"error": "..."}, {"message"}, {"detail"} or the bytes."""
    try:
        body = msgspec.json.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return payload.decode(errors="replace").strip()[:MAX_ERROR_CHARS]
    if isinstance(body, dict) and "error" in body:
        body = body["error"]
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail") or body
    return str(body)[:MAX_ERROR_CHARS]
