"""Role name -> the function that runs it, wired to configuration, secret and membership.

Each entry imports its role's package only when called: no process loads another role's libraries.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

import msgspec

from afd.cluster.endings import Tell
from afd.cluster.stop_policy import why_stop
from afd.config import ClusterConfig
from afd.errors import CoordinatorError
from afd.membership.client import CoordinatorClient
from afd.membership.port import Announce, SyncFields
from afd.membership.thread import MembershipThread, MembershipTiming
from afd.messages.keys import grpc_token
from afd.messages.membership import ClusterView, WorkerInfo

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RoleContext:
    """What a role's process works with.

    rank: asked for; -1 = any.
    stop: set when the process is to end gracefully.
    on_fatal: the cluster does not want this process any more.
    on_ended: told whom to tell of processes of the cluster that have ended, by who started them (the coordinator's).
    """

    name: str
    rank: int
    config: ClusterConfig
    secret: bytes
    stop: threading.Event
    announce: Announce
    on_fatal: Callable[[CoordinatorError], None]
    on_ended: Callable[[Tell], None] = lambda tell: None

    def join(self, info: WorkerInfo, fields: Callable[[], SyncFields]) -> MembershipThread:
        """Enter the cluster: returns at once, registration and heartbeats go on in a side thread."""
        if info.rank < 0:
            info = msgspec.structs.replace(info, rank=self.rank)
        self.announce({"incarnation": info.incarnation})
        section = self.config.coordinator
        client = CoordinatorClient(section.address, grpc_token(self.secret), ca_file=section.tls_ca_file)
        membership = MembershipThread(
            client,
            info,
            fields,
            timing=MembershipTiming.of(self.config.coordinator),
            on_fatal=self.on_fatal,
            announce=self.announce,
        )

        def follow(view: ClusterView) -> None:
            reason = why_stop(view, info.role, info.incarnation)
            if reason is not None and not self.stop.is_set():
                log.info("stopping: %s", reason)
                self.stop.set()

        membership.on_view(follow)
        return membership.start()


RoleEntry = Callable[[RoleContext], int]


def run_coordinator_role(context: RoleContext) -> int:
    from afd.coordinator.service import run_coordinator

    return run_coordinator(context.config, context.secret, context.stop, context.announce, context.on_ended)


def run_attention_role(context: RoleContext) -> int:
    from afd.attention.worker import run_attention_worker

    return run_attention_worker(context.config, context.secret, context.join, context.stop, context.announce)


def run_ffn_role(context: RoleContext) -> int:
    from afd.ffn.worker import run_ffn_worker

    return run_ffn_worker(context.config, context.secret, context.join, context.stop, context.announce)


def run_gateway_role(context: RoleContext) -> int:
    from afd.gateway.serve import run_gateway

    config = context.config
    info = WorkerInfo(
        role="gateway",
        incarnation=uuid.uuid4().hex,
        host=config.gateway.reachable_host,
        pid=os.getpid(),
        config_hash="",
    )
    load: dict[str, float] = {}  # written by the gateway's clock, read by the heartbeat
    membership = context.join(info, lambda: SyncFields(stats=dict(load)))

    def on_ready(url: str) -> None:
        netloc = urlsplit(url).netloc
        metrics = config.gateway.reachable(netloc) if config.gateway.advertise_host else netloc
        membership.update_info(msgspec.structs.replace(info, metrics=metrics))
        context.announce({"url": url})

    try:
        return run_gateway(config, membership, context.secret, on_ready, context.stop, on_load=load.update)
    finally:
        membership.close()


ROLE_ENTRIES: dict[str, RoleEntry] = {
    "coordinator": run_coordinator_role,
    "attention": run_attention_role,
    "ffn": run_ffn_role,
    "gateway": run_gateway_role,
}

_MODULES = {
    "coordinator": "afd.coordinator.service",
    "attention": "afd.attention.worker",
    "ffn": "afd.ffn.worker",
    "gateway": "afd.gateway.serve",
}


def preload(role: str) -> None:
    """Import a role's libraries ahead of its launch frame."""
    importlib.import_module(_MODULES[role])
