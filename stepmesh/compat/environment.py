"""Upstream's environment, read once and checked at once. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from stepmesh.config import MAX_ATTENTION_RANKS, MAX_STREAMS, TRANSPORTS, TransportChoice
from stepmesh.errors import ConfigError

_ROLES = ("worker", "server", "scheduler")


@dataclass(frozen=True, slots=True)
class Environment:
    """Raises ConfigError that lists every problem found.

    node_rank       DMLC_NODE_RANK: which node (instance) of its role
    gpu             STEPMESH_GPU: which device of the node; worker GPU i talks to server GPU i only
    num_workers, num_servers, group_size    DMLC_NUM_WORKER, DMLC_NUM_SERVER (nodes), DMLC_GROUP_SIZE (GPUs a node)
    root_host, root_port    DMLC_PS_ROOT_URI, DMLC_PS_ROOT_PORT: where the scheduler listens
    host            DMLC_NODE_HOST: address of this node ("": the one it reaches the scheduler with)
    interface       DMLC_INTERFACE: take the address of this network device ("", "auto": see host)
    port            DMLC_PORT: of a server's listener (0: any)
    transport       STEPMESH_TRANSPORT: auto, shm, verbs or tcp
    max_message_bytes   STEPMESH_MAX_MESSAGE_BYTES: of all tensors of a push, or of a server's answer
    in_flight       STEPMESH_IN_FLIGHT: exchanges a worker may have under way
    timeout_s       STEPMESH_TIMEOUT: of init, barriers and stop
    stall_s         STEPMESH_STALL_TIMEOUT: a peer that owes an answer and makes no call for so long is lost
    secret          STEPMESH_SECRET
    """

    role: str
    node_rank: int
    gpu: int
    num_workers: int
    num_servers: int
    group_size: int
    root_host: str
    root_port: int
    host: str
    interface: str
    port: int
    transport: TransportChoice
    max_message_bytes: int
    in_flight: int
    timeout_s: float
    stall_s: float
    secret: bytes

    @classmethod
    def parse(cls, variables: Mapping[str, str]) -> Environment:
        problems: list[str] = []

        def number(name: str, default: float, low: float, high: float) -> float:
            text = variables.get(name, "")
            try:
                value = float(text) if text else default
            except ValueError:
                value = float("nan")
            if not low <= value <= high:
                problems.append(f"{name}={text} is not in {low:g}..{high:g}")
                return default
            return value

        def integer(name: str, default: int, low: int, high: int) -> int:
            return int(number(name, default, low, high))

        role = variables.get("DMLC_ROLE", "server")
        if role not in _ROLES:
            problems.append(f"DMLC_ROLE={role} is not one of {', '.join(_ROLES)}")
        transport = variables.get("STEPMESH_TRANSPORT", "auto")
        if transport not in TRANSPORTS or transport == "inproc":
            problems.append(f"STEPMESH_TRANSPORT={transport} is not one of auto, shm, verbs, tcp")
        root_host = variables.get("DMLC_PS_ROOT_URI", "")
        if not root_host:
            problems.append("DMLC_PS_ROOT_URI is not set: the scheduler's address")
        num_workers = integer("DMLC_NUM_WORKER", 1, 1, MAX_ATTENTION_RANKS)
        num_servers = integer("DMLC_NUM_SERVER", 1, 1, MAX_ATTENTION_RANKS)
        group_size = integer("DMLC_GROUP_SIZE", 1, 1, 1024)
        num_nodes = {"worker": num_workers, "server": num_servers}.get(role, 1)
        secret = variables.get("STEPMESH_SECRET", "").encode()
        if secret and len(secret) < 16:
            problems.append("STEPMESH_SECRET is shorter than 16 bytes")
        environment = cls(
            role=role,
            node_rank=integer("DMLC_NODE_RANK", 0, 0, num_nodes - 1),
            gpu=integer("STEPMESH_GPU", 0, 0, group_size - 1),
            num_workers=num_workers,
            num_servers=num_servers,
            group_size=group_size,
            root_host=root_host,
            root_port=integer("DMLC_PS_ROOT_PORT", 0, 1, 65535),
            host=variables.get("DMLC_NODE_HOST", ""),
            interface=variables.get("DMLC_INTERFACE", ""),
            port=integer("DMLC_PORT", 0, 0, 65535),
            transport=cast(TransportChoice, transport),
            max_message_bytes=integer("STEPMESH_MAX_MESSAGE_BYTES", 16 << 20, 4096, 1 << 31),
            in_flight=integer("STEPMESH_IN_FLIGHT", 8, 1, MAX_STREAMS),
            timeout_s=number("STEPMESH_TIMEOUT", 60.0, 0.001, 86400.0),
            stall_s=number("STEPMESH_STALL_TIMEOUT", 600.0, 0.001, 86400.0),
            secret=secret,
        )
        if problems:
            raise ConfigError("environment: " + "; ".join(problems))
        return environment

    @property
    def name(self) -> str:
        """Name of this process in the rendezvous and in messages: "worker 1 gpu 0"."""
        return f"{self.role} {self.node_rank} gpu {self.gpu}"

    @property
    def is_secret(self) -> bool:
        """False: anybody who knows the scheduler's address could join, as upstream."""
        return bool(self.secret)

    @property
    def key(self) -> bytes:
        """The mesh's key."""
        if self.secret:
            return self.secret
        return hashlib.sha256(f"open stepmesh at {self.root_host}:{self.root_port}".encode()).digest()
