"""What requests that are far too long do to others: against a running cluster, with streams of other clients.

    afd up --port 8000 &
    python -m bench.long_requests --url http://127.0.0.1:8000 --streams 32

Each body is sent alone, while the streams run. Reported: status and time of its answer, the longest gap of any stream
meanwhile (beside that of undisturbed streams, which is the floor), and the memory of the gateway with its children. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx
import psutil

CHAT, COMPLETIONS, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
WARM_UP_S = 5.0


def repeated(head: str, item: str, count: int, tail: str) -> bytes:
    """A JSON list of `count` equal items between two pieces of a body."""
    return f"{head}[{','.join([item] * count)}]{tail}".encode()


def bodies() -> Iterator[tuple[str, str, bytes]]:
    """(name, path, body)"""
    text = "的" * 2_600_000
    for path, head, tail in (
        (COMPLETIONS, '{"prompt":"', '"}'),
        (CHAT, '{"messages":[{"role":"user","content":"', '"}]}'),
        (TOKENIZE, '{"prompt":"', '"}'),
    ):
        yield "2.6 M characters", path, f"{head}{text}{tail}".encode()
    yield "8 M blanks", COMPLETIONS, f'{{"prompt":"{" " * 8_300_000}"}}'.encode()
    for path in (CHAT, TOKENIZE):
        yield "250 k messages", path, repeated('{"messages":', '{"role":"user","content":"a"}', 250_000, "}")
    for item, count in (('""', 1_000_000), ('"a"', 1_000_000), ("[1]", 1_000_000)):
        yield f"{count // 1_000_000} M prompts {item}", COMPLETIONS, repeated('{"prompt":', item, count, "}")
    yield "8 MB of ids", COMPLETIONS, repeated('{"prompt":', "7", 4_100_000, "}")
    yield "8 MB of ids", DETOKENIZE, repeated('{"tokens":', "7", 4_100_000, "}")
    yield "10 MB of ids", DETOKENIZE, repeated('{"tokens":', "7", 5_000_000, "}")
    yield "stop ids", COMPLETIONS, repeated('{"prompt":"a","stop_token_ids":', "7", 4_000_000, "}")
    yield "tool calls", CHAT, repeated('{"messages":[{"role":"user","tool_calls":', "{}", 2_700_000, "}]}")
    yield "parts", CHAT, repeated('{"messages":[{"role":"user","content":', '{"type":"text"}', 500_000, "}]}")


@dataclass
class Gaps:
    """Longest gaps between events of all streams, since the last `take`."""

    longest_s: float = 0.0
    num_tokens: int = 0
    last: dict[int, float] = field(default_factory=dict)

    def token(self, stream: int) -> None:
        now = time.perf_counter()
        self.longest_s = max(self.longest_s, now - self.last.get(stream, now))
        self.last[stream] = now
        self.num_tokens += 1

    def take(self) -> tuple[float, int]:
        now = time.perf_counter()
        longest_s = max([self.longest_s, *(now - at for at in self.last.values())])
        num_tokens, self.longest_s, self.num_tokens = self.num_tokens, 0.0, 0
        return longest_s, num_tokens


async def stream(client: httpx.AsyncClient, index: int, gaps: Gaps) -> None:
    """One client that reads answer after answer. An error of any of them ends the run."""
    body = {"prompt": [5 + index] * 8, "max_tokens": 1000, "ignore_eos": True, "stream": True, "return_token_ids": True}
    while True:
        gaps.last.pop(index, None)
        async with client.stream("POST", COMPLETIONS, json=body) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for line in answer.aiter_lines():
                assert '"error"' not in line, line
                if line.startswith("data: {"):
                    gaps.token(index)


async def send(url: str, path: str, body: bytes) -> tuple[int, float]:
    """One request on a connection of its own -> (status, seconds)."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    begun = time.perf_counter()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    try:
        status_line = await asyncio.wait_for(reader.readline(), 60.0)
        return int(status_line.split()[1]), time.perf_counter() - begun
    finally:
        writer.close()


def memory_mib(port: int) -> float:
    """Resident memory of whoever listens there, children included."""
    listeners = [c.pid for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port]
    gateway = psutil.Process(listeners[0])
    return sum(process.memory_info().rss for process in [gateway, *gateway.children(recursive=True)]) / 2**20


async def measure(url: str, num_streams: int) -> dict[str, object]:
    gaps, rows = Gaps(), []
    port = urlsplit(url).port or 80
    limits = httpx.Limits(max_connections=num_streams)
    async with httpx.AsyncClient(base_url=url, timeout=120.0, limits=limits) as client, asyncio.TaskGroup() as group:
        streams = [group.create_task(stream(client, index, gaps)) for index in range(num_streams)]
        await asyncio.sleep(WARM_UP_S)
        gaps.take()
        await asyncio.sleep(WARM_UP_S)
        floor_s, num_tokens = gaps.take()
        print(f"undisturbed: longest gap {1e3 * floor_s:.0f} ms, {num_tokens / WARM_UP_S:.0f} tokens/s")
        for name, path, body in bodies():
            gaps.take()
            status, answer_s = await send(url, path, body)
            await asyncio.sleep(0.5)
            longest_s, _ = gaps.take()
            rows.append(
                {
                    "body": name,
                    "path": path,
                    "status": status,
                    "answer_ms": round(1e3 * answer_s),
                    "gap_ms": round(1e3 * longest_s),
                    "memory_mib": round(memory_mib(port)),
                }
            )
            print(
                "  ".join(
                    f"{value!s:>{width}}" for value, width in zip(rows[-1].values(), (18, 20, 4, 6, 6, 6), strict=True)
                )
            )
        for task in streams:
            task.cancel()
    return {"streams": num_streams, "floor_gap_ms": round(1e3 * floor_s), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--streams", type=int, default=32)
    arguments = parser.parse_args()
    result = asyncio.run(measure(arguments.url.rstrip("/"), arguments.streams))
    print(json.dumps({"machine": f"{platform.machine()}, {os.cpu_count()} cores", **result}))


if __name__ == "__main__":
    main()
