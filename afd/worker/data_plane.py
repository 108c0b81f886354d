"""How a worker's mesh follows the cluster: layout and config hash from the configuration, members from the view."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from afd.config import ClusterConfig
from afd.messages.membership import ClusterView, MeshAddress
from stepmesh.config import MeshConfig, VerbsOptions
from stepmesh.layout import PayloadLayout
from stepmesh.mesh import Mesh
from stepmesh.types import Address, Member, RankId, Role, WireDtype

SPIN_US = 100
"""A stage of the partner takes some hundred microseconds, and a wake-up as long as a stage of a small batch."""

WIRE_DTYPES = {"float32": WireDtype.FP32, "bfloat16": WireDtype.BF16}
WIRE_NAMES = {"fp8": WireDtype.FP8_E4M3, "bf16": WireDtype.BF16, "fp32": WireDtype.FP32}


def payload_layout(config: ClusterConfig, hidden: int, max_top_k: int) -> PayloadLayout:
    """Slot geometry and row types that both ends must agree on."""
    dtype = WIRE_DTYPES[config.model.dtype]
    wire = WIRE_NAMES.get(config.cluster.wire, dtype)
    return PayloadLayout(
        hidden=hidden,
        max_tokens=config.attention.max_step_tokens,
        max_top_k=max_top_k,
        dispatch_dtype=wire,
        combine_dtype=dtype if wire is WireDtype.FP8_E4M3 else wire,
    )


def relays_natively(layout: PayloadLayout) -> bool:
    """Whether rows cross as the kernels take them, so that native code may make exchanges by itself."""
    return layout.dispatch_dtype is layout.combine_dtype is WireDtype.BF16


def config_hash(config: ClusterConfig, fingerprint: str, hidden: int, max_top_k: int) -> str:
    """Digest (hex) of all that attention and FFN workers must agree on; not ports, paths or log level."""
    agreed = {
        "model": fingerprint,
        "dtype": config.model.dtype,
        "weights": config.model.weights,
        "wire": config.cluster.wire,
        "hidden": hidden,
        "top_k": max_top_k,
        "max_step_tokens": config.attention.max_step_tokens,
        "ffn_parallel": config.cluster.ffn_parallel,
        "num_ffn": config.topology.num_ffn,
    }
    return hashlib.blake2b(json.dumps(agreed, sort_keys=True).encode(), digest_size=16).hexdigest()


def mesh_config(
    config: ClusterConfig, role: Role, rank: int, incarnation: str, mesh_key: bytes, agreed: str, layout: PayloadLayout
) -> MeshConfig:
    """The mesh of one worker process. agreed: `config_hash`."""
    section = config.attention if role is Role.ATTENTION else config.ffn
    return MeshConfig(
        id=RankId(role, rank),
        incarnation=incarnation,
        secret=mesh_key,
        config_hash=bytes.fromhex(agreed),
        layout=layout,
        listen_host=section.host,
        listen_port=section.mesh_port,
        advertise_host=section.advertise_host or None,
        transport=config.cluster.transport,
        verbs=VerbsOptions(**msgspec.structs.asdict(config.verbs)),
        stall_timeout_s=config.coordinator.stall_timeout_s,
        checksum=config.cluster.checksum,
        spin_us=SPIN_US,
    )


def published_address(address: Address) -> MeshAddress:
    return MeshAddress(address.unix, address.host, address.port)


def mesh_members(view: ClusterView, role: Role) -> list[Member]:
    """The ranks of one role in a view, as the mesh wants them."""
    return [
        Member(
            RankId(role, member.rank),
            member.info.incarnation,
            Address(member.info.mesh.unix, member.info.mesh.host, member.info.mesh.port),
        )
        for member in view.of_role(role.value)
        if member.info.mesh is not None
    ]


def mesh_metrics(mesh: Mesh) -> Iterable[Metric]:
    """The transport's counters by peer."""
    up = GaugeMetricFamily("afd_mesh_peer", "1 = connected, by transport", labels=["peer", "transport"])
    counters: dict[str, CounterMetricFamily] = {}
    whole = mesh.stats()
    for peer, stats in whole.get("peers", {}).items():
        up.add_metric([peer, str(stats.get("transport", ""))], 1)
        for name, value in stats.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                family = counters.setdefault(
                    name, CounterMetricFamily(f"afd_mesh_{name}", f"stepmesh: {name}", labels=["peer"])
                )
                family.add_metric([peer], value)
    turned_away = CounterMetricFamily("afd_mesh_turned_away", "Connections closed before they were part of a pair")
    turned_away.add_metric([], whole.get("turned_away", 0))
    yield turned_away
    yield up
    yield from counters.values()
