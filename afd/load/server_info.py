"""What the server says of itself before a run: model, vocabulary, and, if it is one of ours, its topology."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from afd.errors import AfdError, ConfigError
from afd.load.http1 import ConnectError, HttpClient, ProtocolError, TransferError
from afd.types import Topology

DEADLINE_S = 10.0
MAX_BODY_BYTES = 4 << 20

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """None = the server does not say. topology: "2A1F" or "mono", of an AFD cluster."""

    model: str
    vocab_size: int | None = None
    max_context: int | None = None
    topology: str | None = None
    version: str | None = None

    @property
    def num_workers(self) -> int | None:
        """Attention and FFN workers; 1 for mono."""
        if self.topology is None:
            return None
        topology = Topology.parse(self.topology)
        return topology.num_attention + topology.num_ffn


class _ModelCard(msgspec.Struct):
    id: str
    max_model_len: int | None = None
    vocab_size: int | None = None


class _Models(msgspec.Struct):
    data: list[_ModelCard]


class _Version(msgspec.Struct):
    version: str | None = None


class _Cluster(msgspec.Struct):
    topology: str | None = None


async def ask_server(client: HttpClient, model: str | None) -> ServerInfo:
    """Query /v1/models, /version and /cluster (the last is ours alone; others answer 404).

    model: the one to use; None = the first that the server lists. ConfigError when nobody answers, the key is refused,
    or no model can be found. A server that has no /v1/models serves when `model` is given.
    """
    status, body = await _get(client, "/v1/models")
    if status in (401, 403):
        raise ConfigError(f"the server refuses the API key (HTTP {status}): pass the right one with --api-key")
    cards = _parse(body, _Models, _Models([])).data if status == 200 else []
    if model is None:
        if not cards:
            raise ConfigError(f"/v1/models (HTTP {status}) names no model: pass --model")
        card = cards[0]
    else:
        card = next((card for card in cards if card.id == model), _ModelCard(model))
    version = await _get_optional(client, "/version", _Version, _Version())
    cluster = await _get_optional(client, "/cluster", _Cluster, _Cluster())
    return ServerInfo(card.id, card.vocab_size, card.max_model_len, _checked(cluster.topology), version.version)


def _checked(topology: str | None) -> str | None:
    """Another server's /cluster may mean anything by "topology"."""
    try:
        return str(Topology.parse(topology)) if topology is not None else None
    except ConfigError:
        return None


async def _get_optional(client: HttpClient, path: str, kind: type[T], default: T) -> T:
    try:
        status, body = await _get(client, path)
    except AfdError:
        return default
    return _parse(body, kind, default) if status == 200 else default


def _parse(body: bytes, kind: type[T], default: T) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return default


async def _get(client: HttpClient, path: str) -> tuple[int, bytes]:
    """Status and body; ConfigError when there is no server to speak to."""
    sink = _BodySink()
    try:
        async with asyncio.timeout(DEADLINE_S):
            await client.get(path, sink)
    except TimeoutError:
        raise ConfigError(f"the server did not answer GET {path} within {DEADLINE_S:g} s") from None
    except ConnectError as error:
        raise ConfigError(f"{error}: is the server running, and is --url right?") from None
    except TransferError as error:
        raise ConfigError(f"GET {path}: {error}") from None
    return sink.status, bytes(sink.body)


class _BodySink:
    """Collects a bounded body."""

    def __init__(self) -> None:
        self.status = 0
        self.body = bytearray()

    def on_response(self, status: int, headers: dict[str, str]) -> None:
        self.status = status

    def on_body(self, data: bytes, now: float) -> None:
        self.body += data
        if len(self.body) > MAX_BODY_BYTES:
            raise ProtocolError(f"an answer of more than {MAX_BODY_BYTES} bytes")
