"""Makes what this host runs of the configuration as written: the model found, thread counts shared out, ports free.

Everything that can be wrong before a process starts is found here, as one line.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import socket
from pathlib import Path
from typing import TypeVar

import msgspec

from afd.config import AttentionConfig, ClusterConfig, FfnConfig
from afd.errors import ConfigError
from afd.host.cores import share_cores
from afd.messages.serving import to_worker_bytes
from afd.model.loading import ModelFolder, resolve_model
from afd.model.sharding import check_sparse
from afd.model.tokenizer_files import load_tokenizer
from afd.types import DispatchMode

FIRST_FREE_PORT = 1024
log = logging.getLogger(__name__)

Section = TypeVar("Section", AttentionConfig, FfnConfig)


def usable_cores() -> int:
    """Cores that this process may use: its affinity, bounded by a cgroup CPU quota; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota()
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def _cgroup_quota() -> float | None:
    """CPU quota in cores (cgroup v2), None when there is none."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()[:2]
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def share_threads(config: ClusterConfig, cores: int) -> ClusterConfig:
    """Fill in thread counts left at 0: a fair share of `cores` for each compute process of one host, at least 1.

    While the other role waits, the workers of one role share all cores: threads_alone.
    """
    topology = config.topology
    share = max(1, cores // (topology.num_attention + topology.num_ffn))

    def filled(section: Section, num_workers: int) -> Section:
        threads = section.threads or share
        alone = section.threads_alone or max(threads, cores // max(1, num_workers))
        return msgspec.structs.replace(section, threads=threads, threads_alone=alone)

    return msgspec.structs.replace(
        config,
        attention=filled(config.attention, topology.num_attention),
        ffn=filled(config.ffn, topology.num_ffn),
    )


def most_threads(config: ClusterConfig, role: str) -> int:
    """Threads that one process of a role ever computes with."""
    if role == "attention":
        return max(config.attention.threads, config.attention.threads_alone)
    if role == "ffn":
        return max(config.ffn.threads, config.ffn.threads_alone)
    return 1


def worker_cores(config: ClusterConfig) -> dict[str, str]:
    """Cores of each worker's main thread, by its name ("attention/0"), where this host has one for each."""
    topology = config.topology
    if not hasattr(os, "sched_getaffinity"):
        return {}
    names = [f"attention/{rank}" for rank in range(topology.num_attention)]
    names += [f"ffn/{rank}" for rank in range(topology.num_ffn)]
    shares = share_cores(sorted(os.sched_getaffinity(0)), len(names), usable_cores())
    return dict(zip(names, shares, strict=True))


def with_cores(config: ClusterConfig, role: str, cores: str) -> ClusterConfig:
    """The configuration of one worker, which keeps to `cores` unless it says itself where to stay."""
    if role == "attention" and not config.attention.cores:
        return msgspec.structs.replace(config, attention=msgspec.structs.replace(config.attention, cores=cores))
    if role == "ffn" and not config.ffn.cores:
        return msgspec.structs.replace(config, ffn=msgspec.structs.replace(config.ffn, cores=cores))
    return config


def whole_host_threads(config: ClusterConfig, cores: int) -> ClusterConfig:
    """The configuration of a worker that has its host to itself: threads for all its cores."""
    return msgspec.structs.replace(
        config,
        attention=msgspec.structs.replace(config.attention, threads=config.attention.threads or cores),
        ffn=msgspec.structs.replace(config.ffn, threads=config.ffn.threads or cores),
    )


def find_model(config: ClusterConfig) -> tuple[ClusterConfig, ModelFolder]:
    """Resolve the model (ModelError when it cannot be served, ConfigError when not so) and name it for the clients.

    Its tokenizer is read as well: what the gateway would refuse is said before workers begin to load.
    """
    folder = resolve_model(config.model.name)
    if load_tokenizer(folder) is None and folder.path is not None:
        log.warning("model %s has no tokenizer that is read: it serves token ids only, no text, no chat", folder.name)
    to_worker_bytes(config, folder.spec.max_context)
    if config.cluster.dispatch is DispatchMode.SPARSE:
        check_sparse(folder.spec, config.cluster.ffn_parallel)
    model = msgspec.structs.replace(config.model, served_name=config.model.served_name or folder.name)
    return msgspec.structs.replace(config, model=model), folder


def check_port(host: str, port: int, what: str, remedy: str) -> None:
    """ConfigError when `port` cannot be bound now. Port 0 is always free."""
    if port == 0:
        return
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"{what}: cannot resolve host {host!r}: {error.strerror}") from error
    with socket.socket(family, kind, proto) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(f"{what}: port {port} on {host} is in use; {remedy}") from error
            why = f"; ports below {FIRST_FREE_PORT} are root's" if error.errno == errno.EACCES else ""
            raise ConfigError(f"{what}: cannot listen on {host}:{port}: {error.strerror}{why}; {remedy}") from error


def check_ports(config: ClusterConfig) -> None:
    """The fixed ports of `afd up`, before anything starts."""
    host, _, port = config.coordinator.address.rpartition(":")
    gateway = config.gateway
    asked = [
        ("gateway", gateway.host, gateway.port, "choose another with --port (0 = any)"),
        ("coordinator", host, int(port), "choose another coordinator.address (port 0 = any)"),
        ("coordinator metrics", host, config.coordinator.metrics_port, "change coordinator.metrics_port"),
    ]
    topology = config.topology
    for section, count, name in (
        (config.attention, topology.num_attention, "attention"),
        (config.ffn, config.num_ffn_workers, "ffn"),
    ):
        fixed = {key: getattr(section, key) for key in ("port", "mesh_port", "metrics_port") if hasattr(section, key)}
        for key, value in fixed.items():
            if value and count > 1:
                raise ConfigError(f"{name}.{key} = {value} cannot serve {count} processes on one host; use 0 (any)")
            if count:
                asked.append((f"{name}.{key}", section.host, value, "use 0 (any)"))
    taken: dict[int, str] = {}
    for what, host, number, remedy in asked:
        if number and number in taken:
            raise ConfigError(f"{what}: port {number} is asked for by {taken[number]} already; {remedy}")
        taken[number] = what
        check_port(host, number, what, remedy)
