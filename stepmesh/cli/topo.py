"""`python -m stepmesh topo`: accelerators, RDMA ports and network devices of this host, and which are near each other.

Everything is read from /sys, so it needs no driver library, no privileges, and tests can hand in a tree of their own.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from stepmesh.transports.verbs.selection import pci_distance

_ACCELERATOR_CLASSES = ("0x0300", "0x0302", "0x1200")  # VGA, 3D controller, processing accelerator
_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel", "0x19e5": "Huawei"}


class Device(NamedTuple):
    """A PCI function. `path`: its real path in /sys; numa_node -1: unknown."""

    name: str
    path: str
    numa_node: int


class NetDevice(NamedTuple):
    """A network device. speed_mbps 0: unknown; device: the PCI function behind it, if any."""

    name: str
    up: bool
    mtu: int
    speed_mbps: int
    device: Device | None


class RdmaPort(NamedTuple):
    """A port of an RDMA device, as the kernel states it ("4: ACTIVE", "100 Gb/sec (4X EDR)", "Ethernet")."""

    name: str
    state: str
    rate: str
    link_layer: str
    gids: tuple[tuple[int, str, str], ...]  # index, type, address
    netdevs: tuple[str, ...]
    device: Device | None


class Host(NamedTuple):
    """What stands in /sys."""

    accelerators: tuple[Device, ...]
    ports: tuple[RdmaPort, ...]
    networks: tuple[NetDevice, ...]
    num_numa_nodes: int


def read_host(root: Path = Path("/")) -> Host:
    """Read /sys under `root`. What is missing or unreadable is left out."""
    sys = root / "sys"
    numa = len([node for node in _names(sys / "devices/system/node") if node.startswith("node")])
    return Host(tuple(_accelerators(sys)), tuple(_ports(sys)), tuple(_networks(sys)), numa)


def nearest(accelerator: Device, ports: tuple[RdmaPort, ...]) -> RdmaPort | None:
    """The active port with the shortest way over the PCI tree; on the same NUMA node where that ties."""

    def far(port: RdmaPort) -> tuple[int, bool, str]:
        assert port.device is not None
        distance = pci_distance(accelerator.path, port.device.path)
        return (distance, port.device.numa_node != accelerator.numa_node, port.name)

    usable = [port for port in ports if port.device is not None and is_active(port)]
    return min(usable, key=far, default=None)


def is_active(port: RdmaPort) -> bool:
    """Whether the link is up."""
    return port.state.endswith("ACTIVE")


def as_dict(host: Host) -> dict[str, Any]:
    """Plain values, with the nearest port of every accelerator."""
    nearby = {one.name: near.name for one in host.accelerators if (near := nearest(one, host.ports)) is not None}
    return {
        "accelerators": [one._asdict() | {"nearest_port": nearby.get(one.name)} for one in host.accelerators],
        "ports": [port._asdict() | {"device": port.device and port.device._asdict()} for port in host.ports],
        "networks": [net._asdict() | {"device": net.device and net.device._asdict()} for net in host.networks],
        "num_numa_nodes": host.num_numa_nodes,
    }


def text(host: Host) -> str:
    """The report for people."""
    lines = [f"NUMA nodes: {host.num_numa_nodes}", "accelerators:"]
    for one in host.accelerators:
        near = nearest(one, host.ports)
        if near is None or near.device is None:
            lines.append(f"  {one.name}  {_numa(one)}  no active RDMA port")
        else:
            hops = pci_distance(one.path, near.device.path)
            lines.append(f"  {one.name}  {_numa(one)}  nearest port {near.name}, {hops} PCI hops")
    lines.append("RDMA ports:")
    for port in host.ports:
        where = f"{port.device.name}  {_numa(port.device)}" if port.device else "software"
        devices = ",".join(port.netdevs) or "-"
        lines.append(f"  {port.name}  {port.state}  {port.rate}  {port.link_layer}  {devices}  {where}")
        lines += [f"    GID {index}  {kind}  {address}" for index, kind, address in port.gids]
    lines.append("network devices:")
    for net in host.networks:
        where = f"{net.device.name}  {_numa(net.device)}" if net.device else "virtual"
        speed = f"{net.speed_mbps / 1000:g} Gb/s" if net.speed_mbps else "speed unknown"
        lines.append(f"  {net.name}  {'up' if net.up else 'down'}  mtu {net.mtu}  {speed}  {where}")
    none = {"accelerators:", "RDMA ports:", "network devices:"}
    shown = []
    for place, line in enumerate(lines):
        following = lines[place + 1] if place + 1 < len(lines) else ""
        shown.append(f"{line} none" if line in none and not following.startswith("  ") else line)
    return "\n".join(shown)


def _accelerators(sys: Path) -> list[Device]:
    found = []
    for name in _names(sys / "bus/pci/devices"):
        folder = sys / "bus/pci/devices" / name
        vendor = _VENDORS.get(_word(folder / "vendor"))
        if vendor and _word(folder / "class").startswith(_ACCELERATOR_CLASSES):
            device = _device(folder)
            assert device is not None
            found.append(device._replace(name=f"{vendor} {device.name}"))
    return found


def _ports(sys: Path) -> list[RdmaPort]:
    found = []
    for name in _names(sys / "class/infiniband"):
        folder = sys / "class/infiniband" / name
        for number in _names(folder / "ports"):
            port = folder / "ports" / number
            kinds = port / "gid_attrs/types"
            gids = []
            for index in sorted(map(int, _names(kinds))):
                kind, address = _word(kinds / str(index)), _word(port / "gids" / str(index))
                if kind and address.replace(":", "").strip("0"):
                    gids.append((index, kind, address))
            netdevs = {_word(port / "gid_attrs/ndevs" / index) for index in _names(port / "gid_attrs/ndevs")}
            found.append(
                RdmaPort(
                    name=f"{name}:{number}",
                    state=_word(port / "state"),
                    rate=_word(port / "rate"),
                    link_layer=_word(port / "link_layer"),
                    gids=tuple(gids),
                    netdevs=tuple(sorted(netdevs - {""})),
                    device=_device(folder / "device"),
                )
            )
    return found


def _networks(sys: Path) -> list[NetDevice]:
    found = []
    for name in _names(sys / "class/net"):
        folder = sys / "class/net" / name
        if not (folder / "operstate").exists():
            continue  # bonding_masters and the like
        speed = _number(folder / "speed", 0)
        up = _word(folder / "operstate") in ("up", "unknown")
        found.append(NetDevice(name, up, _number(folder / "mtu", 0), max(speed, 0), _device(folder / "device")))
    return found


def _device(folder: Path) -> Device | None:
    if not folder.exists():
        return None
    path = os.path.realpath(folder)
    return Device(os.path.basename(path), path, _number(folder / "numa_node", -1))


def _numa(device: Device) -> str:
    return "NUMA ?" if device.numa_node < 0 else f"NUMA {device.numa_node}"


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _word(path: Path) -> str:
    """A file's one line; empty when it is not there or the driver refuses (a GID that is not set does)."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _number(path: Path, default: int) -> int:
    word = _word(path)
    return int(word) if word.lstrip("-").isdecimal() else default
