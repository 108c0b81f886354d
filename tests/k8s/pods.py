"""Pods without Kubernetes: each a process in its own network namespace and with its own view of the file system.

A pod gets an address on a bridge, /etc/hosts with the release's Services, its ConfigMap and Secrets where the chart
mounts them, a read-only root file system and a scratch /tmp. The bridge lives in a namespace, too: the host's network
is not touched. Needs root and iproute2; `unavailable()` says what is missing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from afd.types import host_port
from tests.k8s.chart import REPOSITORY, Object

CLONE_NEWNET = 0x40000000
SUBNETS = {"IPv4": ("10.77.0.", 24), "IPv6": ("fd77::", 64)}
# Runs in the pod's namespaces: its files, a root that cannot be written to, then the container's command.
ENTER = """
set -e
mount --make-rprivate /
mount -t overlay overlay -o lowerdir="$1":/etc /etc
case "$2" in
  /tmp/*) # the program itself lies below /tmp: keep it reachable through the scratch that hides the rest
    mount --bind "$2" /mnt
    mount -t tmpfs -o size=64m tmpfs /tmp
    mkdir -p "$2"
    mount --move /mnt "$2" ;;
  *) mount -t tmpfs -o size=64m tmpfs /tmp ;;
esac
mount -o remount,bind,ro /
shift 2
exec "$@"
"""


def unavailable() -> str:
    """Why pods cannot be made here; "" when they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "network namespaces need iproute2 and util-linux (apt-get install iproute2)"
    probe = f"afd-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return ""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


class Network:
    """A bridge in a namespace of its own, and pods' namespaces beside it. Close it; then nothing is left."""

    def __init__(self) -> None:
        self._tag = f"afd{os.getpid()}"
        self._hub = f"{self._tag}-hub"
        self._namespaces: list[str] = []
        self._add(self._hub)
        ip("-n", self._hub, "link", "add", "bridge", "type", "bridge")
        for family in SUBNETS:
            self._address(self._hub, "bridge", family, 1)
        ip("-n", self._hub, "link", "set", "bridge", "up")

    def _add(self, namespace: str) -> None:
        ip("netns", "add", namespace)
        self._namespaces.append(namespace)
        ip("-n", namespace, "link", "set", "lo", "up")

    def _address(self, namespace: str, device: str, family: str, number: int) -> str:
        prefix, length = SUBNETS[family]
        address = f"{prefix}{number}"
        nodad = ("nodad",) if family == "IPv6" else ()  # nobody else can have it: usable at once
        ip("-n", namespace, "addr", "add", f"{address}/{length}", "dev", device, *nodad)
        return address

    def attach(self, pod: str, family: str) -> tuple[str, str]:
        """A new namespace with one address, of this family: (namespace, address)."""
        number = len(self._namespaces)
        namespace, port = f"{self._tag}-{pod}", f"port{number}"
        self._add(namespace)
        ip("-n", namespace, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", self._hub)
        address = self._address(namespace, "eth0", family, number + 1)
        ip("-n", namespace, "link", "set", "eth0", "up")
        ip("-n", self._hub, "link", "set", port, "master", "bridge", "up")
        return namespace, address

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Sockets that this thread makes in here are on the bridge."""
        with open("/proc/thread-self/ns/net", "rb") as home, open(f"/run/netns/{self._hub}", "rb") as hub:
            _setns(hub.fileno())
            try:
                yield
            finally:
                _setns(home.fileno())

    def close(self) -> None:
        while self._namespaces:
            subprocess.run(["ip", "netns", "del", self._namespaces.pop()], check=True, timeout=20)


def _setns(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


class Pod:
    """One pod of a workload. `start` runs its container, again after it has ended."""

    def __init__(
        self, network: Network, role: str, ordinal: int, template: Object, folder: Path, name: str, family: str
    ):
        self.role = role
        self.name = name
        self.ordinal = ordinal
        self.namespace, self.address = network.attach(self.name, family)
        (self.container,) = template["spec"]["containers"]
        self.labels = template["metadata"]["labels"]
        self._etc = folder / self.name / "etc"
        self._log = (folder / f"{self.name}.log").open("wb")
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def ports(self) -> dict[str, int]:
        return {entry["name"]: entry["containerPort"] for entry in self.container["ports"]}

    def url(self, port: str) -> str:
        """Of one of the container's ports, by name."""
        return f"http://{host_port(self.address, self.ports[port])}"

    def mount(self, files: dict[str, bytes]) -> None:
        """Files below /etc, by absolute path. Before `start`."""
        for path, data in files.items():
            target = self._etc / path.removeprefix("/etc/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
            target.chmod(0o440 if "secret" in path else 0o444)

    def remount(self, path: str, data: bytes) -> None:
        """What the kubelet does to a mounted ConfigMap that has changed; the process runs on."""
        (self._etc / path.removeprefix("/etc/")).write_bytes(data)

    def start(self) -> None:
        """Run the container's command with the kubelet's substitutions."""
        self.process = self._enter(self.container["args"], self._log)

    def execute(self, *arguments: str) -> str:
        """`kubectl exec`: what afd prints in the container; it must succeed."""
        process = self._enter(arguments, subprocess.PIPE)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        return output.decode()

    def _enter(self, arguments: Sequence[str], output: IO[bytes] | int) -> subprocess.Popen[bytes]:
        environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
        environment["PYTHONPATH"] = str(REPOSITORY)  # the image has it installed
        environment |= {entry["name"]: entry["value"] for entry in self.container["env"] if "value" in entry}
        environment |= {"POD_IP": self.address, "AFD_RANK": str(self.ordinal)}
        command = [sys.executable, "-m", "afd"]
        for text in arguments:
            command.append(text.replace("$(POD_IP)", self.address).replace("$(AFD_RANK)", str(self.ordinal)))
        return subprocess.Popen(
            [
                *(
                    "ip",
                    "netns",
                    "exec",
                    self.namespace,
                    "unshare",
                    "--mount",
                    "sh",
                    "-c",
                    ENTER,
                    "sh",
                    str(self._etc),
                    str(REPOSITORY),
                ),
                *command,
            ],
            cwd="/",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )

    def kill(self) -> None:
        """The process is gone at once, as after an out-of-memory kill."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def terminate(self) -> None:
        """What the kubelet sends first."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)

    def log(self) -> str:
        return Path(self._log.name).read_text(errors="replace")

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()
        self._log.close()
