"""What workers and servers have in common: meeting at the scheduler, forming the mesh of their rail, barriers, leaving.

A rail is one GPU index: worker GPU i and server GPU i of every node form a mesh of their own.
"""

from __future__ import annotations

import fcntl
import logging
import secrets
import socket
import struct
import time
from abc import ABC, abstractmethod

from stepmesh.compat.environment import Environment
from stepmesh.compat.message import ROW_BYTES, num_rows
from stepmesh.config import MeshConfig
from stepmesh.errors import ConfigError, MeshError, TransportError
from stepmesh.layout import PayloadLayout
from stepmesh.mesh import Mesh
from stepmesh.rendezvous import RendezvousClient
from stepmesh.types import Event, Member, RankId, Role, WireDtype

log = logging.getLogger("stepmesh")

EPOCH = 1
_POLL_S = 0.1
_MAX_ROWS = 1 << 20
_SIOCGIFADDR = 0x8915


class ExchangeTimeout(MeshError, TimeoutError):
    """The time was over before everything came. Nothing is lost by it: one may wait again."""

    retryable = True


class PeerLostError(MeshError):
    """A peer that the exchange needed was lost. Push again: the mesh goes on trying to reach it."""

    retryable = True


class Node(ABC):
    """One worker or server process, from construction (upstream's init) to stop. One thread uses it."""

    def __init__(self, environment: Environment) -> None:
        self.environment = env = environment
        self._barriers = 0
        self._meeting = RendezvousClient(env.root_host, env.root_port, env.key, env.name, env.timeout_s)
        self._mesh: Mesh
        try:
            self._mesh = Mesh(self._config())
            try:
                self._join()
            except BaseException:
                self._mesh.close()
                raise
        except BaseException:
            self._meeting.close()
            raise

    @property
    @abstractmethod
    def role(self) -> Role:
        """Workers are attention ranks, servers FFN ranks."""

    @abstractmethod
    def _take(self, event: Event) -> None:
        """Something has happened on the mesh."""

    def barrier(self, include_server: bool, include_client: bool, instance_barrier: bool) -> None:
        """Raises ConfigError when this role is not among them, TransportError when not all come in time."""
        env = self.environment
        included = include_server if self.role is Role.FFN else include_client
        if not included:
            raise ConfigError(f"{env.name} waits at a barrier that does not include it")
        if not instance_barrier and env.gpu != 0:
            return
        num_nodes = env.num_servers * include_server + env.num_workers * include_client
        size = num_nodes * (env.group_size if instance_barrier else 1)
        self._gather(f"barrier {include_server:d}{include_client:d}{instance_barrier:d}", size)

    def stop(self) -> None:
        """Wait for all others, then leave; leaves as well when they do not come (and raises TransportError)."""
        env = self.environment
        try:
            self._gather("stop", (env.num_workers + env.num_servers) * env.group_size)
        finally:
            self._mesh.close()
            self._meeting.close()

    def close(self) -> None:
        """Leave at once. Idempotent."""
        self._mesh.close()
        self._meeting.close()

    def progress(self, seconds: float) -> None:
        """Let things happen for a while; returns early when something has."""
        for event in self._mesh.progress(min(seconds, _POLL_S)):
            self._take(event)

    def _gather(self, name: str, size: int, payload: object = None) -> dict[str, object]:
        return self._meeting.gather(name, size, payload, timeout_s=self.environment.timeout_s, meanwhile=self.progress)

    def _config(self) -> MeshConfig:
        env = self.environment
        if not env.is_secret:
            log.warning("%s: no STEPMESH_SECRET: whoever reaches the scheduler's port can join this mesh", env.name)
        rows = num_rows(env.max_message_bytes)
        if rows > _MAX_ROWS:
            raise ConfigError(f"STEPMESH_MAX_MESSAGE_BYTES {env.max_message_bytes} exceeds {_MAX_ROWS * ROW_BYTES}")
        return MeshConfig(
            id=RankId(self.role, env.node_rank),
            incarnation=secrets.token_hex(8),
            secret=env.key,
            config_hash=f"compat rail {env.gpu}".encode(),
            layout=PayloadLayout(ROW_BYTES // 4, rows, 0, WireDtype.FP32, WireDtype.FP32),
            num_streams=env.in_flight,
            listen_host=env.host or _address_of(env.interface) or self._meeting.local_host,
            listen_port=env.port,
            transport=env.transport,
            stall_timeout_s=env.stall_s,
            exchange_timeout_s=env.stall_s,
            trace_events=0,
        )

    def _join(self) -> None:
        """Learn who is there, connect to the other role's ranks of this rail, and wait for all to have done so."""
        env, mesh = self.environment, self._mesh
        mesh.watch_fd(self._meeting.fileno())
        everybody = (env.num_workers + env.num_servers) * env.group_size
        mine = {"gpu": env.gpu, "member": Member(mesh.id, mesh.config.incarnation, mesh.address).to_dict()}
        met = self._gather("init", everybody, mine)
        peers = []
        for fields in met.values():
            assert isinstance(fields, dict)
            member = Member.from_dict(fields["member"])
            if fields["gpu"] == env.gpu and member.id.role is self.role.other:
                peers.append(member)
        mesh.set_members(EPOCH, peers)
        deadline = time.monotonic() + env.timeout_s
        while len(mesh.peers) < len(peers):
            self.progress(_POLL_S)
            if time.monotonic() > deadline:
                missing = sorted(str(member.id) for member in peers if member.id not in mesh.peers)
                raise TransportError(f"{env.name}: not connected to {', '.join(missing)} in {env.timeout_s:g} s")
        self._gather("connected", everybody)


def _address_of(interface: str) -> str:
    """IPv4 address of a network device; "" for none or "auto". Raises ConfigError when it has none."""
    if interface in ("", "auto"):
        return ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            answer = fcntl.ioctl(sock, _SIOCGIFADDR, struct.pack("256s", interface[:15].encode()))
        except OSError as error:
            raise ConfigError(f"DMLC_INTERFACE={interface}: {error.strerror}") from None
    return socket.inet_ntoa(answer[20:24])
