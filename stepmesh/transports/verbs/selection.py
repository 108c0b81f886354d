"""Which port, which GID, which MTU. Pure: takes what `Verbs.ports` and the configuration say.

A port is chosen by, in this order: its name in the configuration; the rank's own address standing in the port's GID
table (the data then goes where the operator has put the rank); the shortest way over the PCI tree to the configured
GPU; a hardware port before a software one; the first name.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from stepmesh.config import VerbsOptions
from stepmesh.errors import TransportError
from stepmesh.transports.verbs.base import Gid, GidKind, Port

_SMALLEST_MTU = 256


class Selection(NamedTuple):
    """A port and the GID to send from, and why, in words."""

    port: Port
    gid: Gid
    reason: str


def select(ports: Sequence[Port], options: VerbsOptions, host: str, near_path: str = "") -> Selection:
    """Choose for a rank that is reached at `host`; `near_path`: real path in /sys of options.near.

    Raises TransportError that says why no port will do.
    """
    if not ports:
        raise TransportError("no RDMA device")
    named = [port for port in ports if _is_named(port, options.device)]
    if not named:
        known = ", ".join(f"{port.device}:{port.number}" for port in ports)
        raise TransportError(f"no RDMA port {options.device!r} here (there are {known})")
    usable = [port for port in named if port.active and _gids(port, options.gid_index)]
    if not usable:
        raise TransportError("no usable RDMA port: " + "; ".join(_defect(port, options) for port in named))
    reasons = {}
    ranked = []
    for port in usable:
        own = _gid_of_host(port, host, options.gid_index)
        distance = pci_distance(port.pci_path, near_path)
        rank = (own is None, distance, not port.pci_path, port.device, port.number)
        ranked.append((rank, port, own or _gids(port, options.gid_index)[0]))
        if options.device:
            reasons[port] = "named in the configuration"
        elif own is not None:
            reasons[port] = f"has this rank's address {host}"
        elif near_path and port.pci_path:
            reasons[port] = f"nearest to {options.near} ({distance} PCI hops)"
        else:
            reasons[port] = "the only one" if len(usable) == 1 else "the first of those that are active"
    _, port, gid = min(ranked, key=lambda candidate: candidate[0])
    return Selection(port, gid, f"{port.device}:{port.number} {reasons[port]}, GID {gid.number} {gid.address}")


def common_mtu(ours: int, theirs: int, limit_bytes: int) -> int:
    """The path MTU's code: the smaller of both ends', and not above the configured limit (0: none)."""
    code = min(ours, theirs)
    if limit_bytes:
        code = min(code, (limit_bytes // _SMALLEST_MTU).bit_length())
    return code


def pci_distance(one: str, other: str) -> int:
    """Bridges between two functions of the PCI tree by their paths in /sys; large when one is unknown.

    /sys/devices/pci0000:3a/0000:3a:00.0/0000:3b:00.0 and .../0000:3a:00.0/0000:3c:00.0 share one bridge: 2.
    """
    if not one or not other:
        return 1000
    first, second = PurePosixPath(one).parts, PurePosixPath(other).parts
    shared = 0
    for left, right in zip(first, second, strict=False):
        if left != right:
            break
        shared += 1
    return len(first) + len(second) - 2 * shared


def _is_named(port: Port, name: str) -> bool:
    return not name or name in (port.device, f"{port.device}:{port.number}")


def _gids(port: Port, wanted_index: int) -> list[Gid]:
    """GIDs that can be sent from, the best one first: RoCE v2 on IPv4, RoCE v2 on a routable IPv6, the others."""
    if wanted_index >= 0:
        return [gid for gid in port.gids if gid.number == wanted_index]

    def badness(gid: Gid) -> tuple[int, bool, bool, int]:
        address = ipaddress.IPv6Address(gid.address)
        return (-gid.kind, address.ipv4_mapped is None, address.is_link_local, gid.number)

    if port.ethernet:
        return sorted((gid for gid in port.gids if gid.kind is not GidKind.INFINIBAND), key=badness)
    return sorted(port.gids, key=lambda gid: gid.number)


def _gid_of_host(port: Port, host: str, wanted_index: int) -> Gid | None:
    """The GID that is the rank's own address, if the port has one."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None  # a name: it would take a resolver to know
    wanted = address if address.version == 6 else ipaddress.IPv6Address(f"::ffff:{address}")
    for gid in _gids(port, wanted_index):
        if ipaddress.IPv6Address(gid.address) == wanted:
            return gid
    return None


def _defect(port: Port, options: VerbsOptions) -> str:
    name = f"{port.device}:{port.number}"
    if not port.active:
        return f"{name} is not active (cable, or `ip link set up` of its network device)"
    if options.gid_index >= 0:
        return f"{name} has no GID {options.gid_index}"
    return f"{name} has no RoCE GID (give its network device an address)"
