"""A worker listens on one address and is known by another: the mesh, ZeroMQ and metrics addresses that it publishes."""

from __future__ import annotations

import pytest

from afd.config import ClusterConfig, Listener, resolve_config
from afd.errors import ConfigError
from afd.worker.data_plane import mesh_config
from stepmesh.layout import PayloadLayout
from stepmesh.mesh import Mesh
from stepmesh.types import Role, WireDtype

LAYOUT = PayloadLayout(hidden=8, max_tokens=4, max_top_k=2, dispatch_dtype=WireDtype.FP32, combine_dtype=WireDtype.FP32)


@pytest.mark.parametrize(
    ("listener", "bound", "published"),
    [
        (Listener(host="0.0.0.0", advertise_host="10.0.0.7"), "tcp://0.0.0.0:7071", "10.0.0.7:7071"),
        (Listener(host="0.0.0.0", advertise_host="ffn-0"), "0.0.0.0:9102", "ffn-0:9102"),
        (Listener(host="127.0.0.1"), "127.0.0.1:4000", "127.0.0.1:4000"),
        (Listener(host="::", advertise_host="fd00::7"), "tcp://[::]:7071", "[fd00::7]:7071"),
        (Listener(host="::1"), "[::1]:9102", "[::1]:9102"),
    ],
)
def test_a_bound_address_as_the_others_reach_it(listener: Listener, bound: str, published: str) -> None:
    assert listener.reachable(bound) == published


@pytest.mark.parametrize("role", ["attention", "ffn"])
def test_a_wildcard_alone_is_refused(role: str) -> None:
    with pytest.raises(ConfigError, match=rf"{role}\.host 0\.0\.0\.0 .* set {role}\.advertise_host"):
        resolve_config(None, {f"{role}.host": "0.0.0.0"})
    resolve_config(None, {f"{role}.host": "0.0.0.0", f"{role}.advertise_host": "10.0.0.7"})


def test_the_gateway_may_listen_everywhere() -> None:
    assert resolve_config(None, {"gateway.host": "0.0.0.0"}).gateway.reachable_host == "0.0.0.0"


def published_host(config: ClusterConfig, role: Role) -> str:
    with Mesh(mesh_config(config, role, 0, "one", b"s" * 16, "00", LAYOUT)) as mesh:
        return mesh.address.host


def test_the_mesh_publishes_what_is_advertised() -> None:
    everywhere = {"ffn.host": "0.0.0.0", "ffn.advertise_host": "10.0.0.7", "cluster.transport": "tcp"}
    assert published_host(resolve_config(None, everywhere), Role.FFN) == "10.0.0.7"
    assert published_host(resolve_config(None, {"cluster.transport": "tcp"}), Role.FFN) == "127.0.0.1"
