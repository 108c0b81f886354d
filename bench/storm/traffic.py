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
    """`with Traffic(url, model, prompts, num_tokens, num_users) as traffic: ...; traffic.streams`.

    The users run in a thread of their own until the context ends; each then finishes its request, within `patience_s`.
    streams: every request, in the order sent.
    standstills: from when to when this process could not run, times of `time.perf_counter()`.
    """

    def __init__(
        self,
        url: str,
        model: str,
        prompts: Sequence[Sequence[int]],
        num_tokens: int,
        num_users: int,
        patience_s: float = 90.0,
    ):
        self.streams: list[Stream] = []
        self.standstills: list[tuple[float, float]] = []
        self._url = ServerUrl.parse(url)
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
        client = HttpClient(self._url)
        users = [asyncio.create_task(self._user(client, idx)) for idx in range(self._num_users)]
        try:
            while not self._stop.is_set():
                begin = time.perf_counter()
                await asyncio.sleep(TICK_S)
                if time.perf_counter() - begin > STANDSTILL_S:
                    self.standstills.append((begin, time.perf_counter()))
            async with asyncio.timeout(self._patience_s):
                await asyncio.gather(*users)
        except TimeoutError:
            pass  # the streams that are cancelled now say so themselves
        finally:
            for user in users:
                user.cancel()
            await asyncio.gather(*users, return_exceptions=True)
            await client.close()

    async def _user(self, client: HttpClient, first_idx: int) -> None:
        idx = first_idx
        while not self._stop.is_set():
            stream = Stream(idx % len(self._bodies), time.perf_counter())
            self.streams.append(stream)
            reader = _Reader(stream)
            try:
                await client.post("/v1/completions", self._bodies[stream.prompt_idx], reader)
                reader.finish(self._num_tokens)
            except (TransferError, ProtocolError, msgspec.DecodeError) as error:
                stream.error = stream.error or f"{type(error).__name__}: {error}"
            except asyncio.CancelledError:
                stream.error = f"not ended {self._patience_s:g} s after the storm"
                raise
            finally:
                stream.ended_s = time.perf_counter()
            idx += self._num_users
            if stream.error:
                await asyncio.sleep(RETRY_S)
