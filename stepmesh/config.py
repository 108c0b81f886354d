"""A mesh's configuration: declared once, checked at once, never changed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from stepmesh.errors import ConfigError
from stepmesh.layout import PayloadLayout
from stepmesh.types import RankId

TransportChoice = Literal["auto", "shm", "verbs", "tcp", "inproc"]
TRANSPORTS = ("auto", "shm", "verbs", "tcp", "inproc")
MAX_STREAMS = 64
MAX_ATTENTION_RANKS = 128  # width of the gang's member mask


@dataclass(frozen=True, slots=True)
class VerbsOptions:
    """How RDMA connections are made. Raises ConfigError. The defaults suit most RoCE v2 networks.

    device          "mlx5_0", or "mlx5_0:2" for its second port; "": see transports/verbs/selection.py
    near            PCI address ("0000:3b:00.0") of the GPU whose nearest port is wanted
    gid_index       of the port's GID table; -1: RoCE v2, IPv4 before IPv6
    mtu_bytes       upper limit of the path MTU (256..4096, power of two); 0: what both ports have
    service_level   0..15: InfiniBand's, and RoCE's priority where traffic_class does not set it
    traffic_class   0..255: the IP header's, DSCP in its upper six bits
    timeout         0..31: an unacknowledged packet is sent again after 4.096 us * 2^timeout (14: 67 ms)
    retry_count     0..7 times; Soft-RoCE takes 7 for "for ever"
    rnr_retry       0..7 times, when the peer has no receive posted (which our peers always have)
    """

    device: str = ""
    near: str = ""
    gid_index: int = -1
    mtu_bytes: int = 0
    service_level: int = 0
    traffic_class: int = 0
    timeout: int = 14
    retry_count: int = 6
    rnr_retry: int = 6

    def __post_init__(self) -> None:
        problems = []
        for name, low, high in (
            ("gid_index", -1, 255),
            ("service_level", 0, 15),
            ("traffic_class", 0, 255),
            ("timeout", 0, 31),
            ("retry_count", 0, 7),
            ("rnr_retry", 0, 7),
        ):
            if not low <= getattr(self, name) <= high:
                problems.append(f"{name} {getattr(self, name)} is not in {low}..{high}")
        if self.mtu_bytes not in (0, 256, 512, 1024, 2048, 4096):
            problems.append(f"mtu_bytes {self.mtu_bytes} is not one of 0, 256, 512, 1024, 2048, 4096")
        if problems:
            raise ConfigError("verbs: " + "; ".join(problems))


@dataclass(frozen=True, slots=True)
class MeshConfig:
    """Everything a mesh needs to know. Raises ConfigError that lists every problem found.

    id, incarnation     this rank, and a string that is new for every process start
    secret              key shared by the cluster (16 bytes or more); never sent
    config_hash         digest of all that both ends must agree on (model, dtypes, shapes)
    layout, num_streams slot geometry; both ends must agree (checked in the handshake)
    listen_host/_port   FFN ranks: TCP listener (port 0: any free one)
    advertise_host      what others are told to connect to (default: listen_host)
    transport           "auto": shm on the same host, verbs where both ends have an active RDMA port, else tcp.
                        "shm", "verbs", "tcp": only that one
    verbs               how RDMA connections are made
    heartbeat_s         period of the heartbeats
    peer_timeout_s      silence after which a peer is lost
    stall_timeout_s     a peer with work pending whose progress counter stands still for this long is lost
    exchange_timeout_s  a dispatch without an answer from a living, progressing peer for this long: pair reset
    connect_timeout_s   limit of one handshake, and the age at which a failing connection is reported
    spin_us             busy polling before `progress` blocks, while that pays; 0: never
    checksum            crc32 over header and payload of what this rank sends (received ones are always checked)
    max_pending         unauthenticated connections kept at once; beyond, the oldest is closed
    trace_events        size of the ring of timestamps (0: off)
    """

    id: RankId
    incarnation: str
    secret: bytes
    config_hash: bytes
    layout: PayloadLayout
    num_streams: int = 4
    listen_host: str = "127.0.0.1"
    listen_port: int = 0
    advertise_host: str | None = None
    transport: TransportChoice = "auto"
    verbs: VerbsOptions = VerbsOptions()
    heartbeat_s: float = 0.2
    peer_timeout_s: float = 1.0
    stall_timeout_s: float = 5.0
    exchange_timeout_s: float = 30.0
    connect_timeout_s: float = 5.0
    spin_us: int = 30
    checksum: bool = False
    max_pending: int = 64
    trace_events: int = 4096

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.id.rank < MAX_ATTENTION_RANKS:
            problems.append(f"rank {self.id.rank} is not in 0..{MAX_ATTENTION_RANKS - 1}")
        if not 1 <= len(self.incarnation) <= 64 or not self.incarnation.isascii():
            problems.append("incarnation must be 1..64 ASCII characters")
        if len(self.secret) < 16:
            problems.append(f"secret has {len(self.secret)} bytes, at least 16 are needed")
        if not 1 <= len(self.config_hash) <= 64:
            problems.append("config_hash must be 1..64 bytes")
        if not 1 <= self.num_streams <= MAX_STREAMS:
            problems.append(f"num_streams {self.num_streams} is not in 1..{MAX_STREAMS}")
        if self.transport not in TRANSPORTS:
            problems.append(f"transport {self.transport!r} is not one of {', '.join(TRANSPORTS)}")
        for name in ("heartbeat_s", "peer_timeout_s", "stall_timeout_s", "exchange_timeout_s", "connect_timeout_s"):
            if not getattr(self, name) > 0:
                problems.append(f"{name} must be positive")
        if self.peer_timeout_s < 2 * self.heartbeat_s:
            problems.append("peer_timeout_s must be at least twice heartbeat_s")
        if self.spin_us < 0 or self.trace_events < 0 or self.max_pending < 1:
            problems.append("spin_us and trace_events must not be negative, max_pending must be positive")
        if problems:
            raise ConfigError(f"mesh of {self.id}: " + "; ".join(problems))

    def __repr__(self) -> str:
        """All fields but the secret, which must not reach a log."""
        shown = (f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self) if f.name != "secret")
        return f"MeshConfig({', '.join(shown)})"

    @property
    def rx_slot_bytes(self) -> int:
        """Size of the slots this rank receives into."""
        receives_dispatches = self.id.role.value == "ffn"
        return self.layout.dispatch_slot_bytes if receives_dispatches else self.layout.combine_slot_bytes

    @property
    def tx_slot_bytes(self) -> int:
        """Size of the peer's slots this rank sends into."""
        sends_dispatches = self.id.role.value == "attention"
        return self.layout.dispatch_slot_bytes if sends_dispatches else self.layout.combine_slot_bytes
