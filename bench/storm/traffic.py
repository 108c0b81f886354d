"""Streaming clients of a storm: so many users, each sending its next request when its last one has ended."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from afd.load.http1 import HttpClient, ProtocolError, ServerUrl, TransferError
from afd.load.sse import SseParser
from bench.storm.account import Stream

TICK_S = 0.02
STANDSTILL_S = 0.25
REFUSALS = (429, 503)
RETRY_S = 0.2


class _Reader:
    """Writes one answer into its `Stream`."""

    def __init__(self, stream: Stream):
        self.status = 0
        self.done = False
        self._stream = stream
        self._sse = SseParser()
        self._rest = bytearray()

    def on_response(self, status: int, headers: dict[str, str]) -> None:
        self.status = status

    def on_body(self, data: bytes, now: float) -> None:
        if self.status != 200:
            self._rest += data
            return
        for payload in self._sse.feed(data):
            if payload == b"[DONE]":
                self.done = True
            else:
                self._take(msgspec.json.decode(payload), now)

    def _take(self, event: dict[str, Any], now: float) -> None:
        if "error" in event:
            self._stream.error = str(event["error"].get("message"))
            return
        self._stream.request_id = event["id"].removeprefix("cmpl-")
        ids = [token for choice in event["choices"] for token in choice.get("token_ids") or []]
        if ids:
            self._stream.ids += ids
            self._stream.token_s.append(now)

    def finish(self, num_tokens: int) -> None:
        """The exchange is over."""
        if self.status != 200:
            self._stream.error = f"HTTP {self.status}: {self._rest.decode(errors='replace')[:300]}"
            self._stream.refused = self.status in REFUSALS
        elif not self._stream.error and (not self.done or len(self._stream.ids) != num_tokens):
            self._stream.error = f"ended after {len(self._stream.ids)} of {num_tokens} tokens"


class Traffic:
    """`with Traffic(urls, model, prompts, num_tokens, num_users) as traffic: ...; traffic.streams`.

    urls: of the gateways. Users are spread over them; one whose request fails sends the next to the next gateway.

    The users run in a thread of their own until the context ends; each then finishes its request, within `patience_s`.
    streams: every request, in the order sent.
    standstills: from when to when this process could not run, times of `time.perf_counter()`.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: str,
        prompts: Sequence[Sequence[int]],
        num_tokens: int,
        num_users: int,
        patience_s: float = 90.0,
    ):
        self.streams: list[Stream] = []
        self.standstills: list[tuple[float, float]] = []
        self._urls = [ServerUrl.parse(url) for url in urls]
        self._num_tokens = num_tokens
        self._num_users = num_users
        self._patience_s = patience_s
        self._bodies = [
            msgspec.json.encode(
                {
                    **{"model": model, "prompt": list(prompt), "max_tokens": num_tokens, "temperature": 0},
                    **{"stream": True, "ignore_eos": True, "return_token_ids": True},
                }
            )
            for prompt in prompts
        ]
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="traffic", daemon=True)

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(self._patience_s + 10.0)
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            asyncio.run(self._all_users())
        except BaseException as error:
            self._failure = error

    async def _all_users(self) -> None:
        clients = [HttpClient(url) for url in self._urls]
        users = [asyncio.create_task(self._user(clients, idx)) for idx in range(self._num_users)]
        try:
            left_s = self._patience_s  # standing still costs none of it
            while left_s > 0 and not all(user.done() for user in users):
                begin_s = time.perf_counter()
                await asyncio.sleep(TICK_S)
                end_s = time.perf_counter()
                if end_s - begin_s > STANDSTILL_S:
                    self.standstills.append((begin_s, end_s))
                elif self._stop.is_set():
                    left_s -= end_s - begin_s
        finally:
            for user in users:
                user.cancel()
            await asyncio.gather(*users, return_exceptions=True)
            for client in clients:
                await client.close()

    async def _user(self, clients: list[HttpClient], first_idx: int) -> None:
        idx = server = first_idx
        while not self._stop.is_set():
            server %= len(clients)
            stream = Stream(idx % len(self._bodies), time.perf_counter(), server=server)
            self.streams.append(stream)
            reader = _Reader(stream)
            try:
                await clients[server].post("/v1/completions", self._bodies[stream.prompt_idx], reader)
                reader.finish(self._num_tokens)
            except (TransferError, ProtocolError, msgspec.DecodeError) as error:
                stream.error = stream.error or f"{type(error).__name__}: {error}"
            except asyncio.CancelledError:
                silent_s = time.perf_counter() - (stream.token_s or [stream.sent_s])[-1]
                stream.error = f"not ended {self._patience_s:g} s after the storm, silent for {silent_s:.1f} s"
                raise
            finally:
                stream.ended_s = time.perf_counter()
            idx += self._num_users
            if stream.error:
                server += 1
                await asyncio.sleep(RETRY_S)
