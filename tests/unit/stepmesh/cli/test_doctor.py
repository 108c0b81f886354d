"""The doctor's judgement, and what it reads, over hosts made of files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from stepmesh.cli import doctor, topo
from stepmesh.cli.doctor import FAIL, INFO, OK, WARN, Finding, findings
from stepmesh.cli.facts import Facts, read_facts
from stepmesh.cli.main import main

GPU = "devices/pci0000:3a/0000:3a:00.0/0000:3b:00.0"
NEAR = "devices/pci0000:3a/0000:3a:00.0/0000:3c:00.0"
FAR = "devices/pci0000:b0/0000:b0:00.0/0000:b1:00.0"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def pci(sys: Path, where: str, vendor: str, kind: str, numa: int) -> None:
    for name, value in (("vendor", vendor), ("class", kind), ("numa_node", str(numa))):
        write(sys / where / name, value)
    link = sys / "bus/pci/devices" / where.rsplit("/", 1)[1]
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(sys / where)


def rdma(sys: Path, name: str, where: str, *, state: str = "4: ACTIVE", gids: bool = True) -> None:
    folder = sys / "class/infiniband" / name
    write(folder / "ports/1/state", state)
    write(folder / "ports/1/rate", "400 Gb/sec (4X NDR)")
    write(folder / "ports/1/link_layer", "Ethernet")
    for index, (kind, address) in enumerate(
        [("IB/RoCE v1", "fe80::1"), ("RoCE v2", "::ffff:10.0.0.1"), ("", "0000:0000")] if gids else []
    ):
        write(folder / f"ports/1/gids/{index}", address)
        write(folder / f"ports/1/gid_attrs/types/{index}", kind)
        write(folder / f"ports/1/gid_attrs/ndevs/{index}", f"eth-{name}")
    (folder / "device").symlink_to(sys / where)


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """A GPU server: one GPU, two ports of which the second is nearer, 100 Gb/s Ethernet with a small MTU."""
    sys = tmp_path / "sys"
    pci(sys, GPU, "0x10de", "0x030200", 0)
    pci(sys, NEAR, "0x15b3", "0x020000", 0)
    pci(sys, FAR, "0x15b3", "0x020000", 1)
    rdma(sys, "mlx5_0", FAR)
    rdma(sys, "mlx5_1", NEAR)
    for name in ("eth0", "lo"):
        write(sys / "class/net" / name / "operstate", "up" if name == "eth0" else "unknown")
        write(sys / "class/net" / name / "mtu", "1500")
        write(sys / "class/net" / name / "speed", "100000" if name == "eth0" else "-1")
    (sys / "class/net/eth0/device").symlink_to(sys / NEAR)
    write(sys / "devices/system/clocksource/clocksource0/current_clocksource", "hpet")
    write(sys / "fs/cgroup/cpu.max", "50000 100000")
    write(sys / "fs/cgroup/memory.max", str(1 << 30))
    write(sys / "kernel/mm/transparent_hugepage/shmem_enabled", "always within_size [advise] never")
    for node in ("node0", "node1"):
        (sys / "devices/system/node" / node).mkdir(parents=True)
    write(tmp_path / "proc/modules", "nvidia_peermem 16384 0 - Live 0x0")
    write(tmp_path / "proc/meminfo", "MemTotal: 100 kB\nHugePages_Total: 8\nHugePages_Free: 3")
    write(tmp_path / "proc/sys/net/core/rmem_max", "212992")
    write(tmp_path / "dev/infiniband/uverbs0", "")
    write(tmp_path / "dev/nvidiactl", "")
    return tmp_path


def found(facts: Facts, what: str) -> list[Finding]:
    return [finding for finding in findings(facts) if finding.what == what]


def test_facts_come_from_the_tree(server: Path) -> None:
    facts = read_facts(server)
    assert (facts.cpu_quota_cores, facts.memory_limit_bytes, facts.shmem_huge) == (0.5, 1 << 30, "advise")
    assert (facts.huge_pages, facts.huge_pages_free, facts.rmem_max) == (8, 3, 212992)
    assert (facts.clock_source, facts.peermem, facts.has_cuda) == ("hpet", "nvidia_peermem", True)
    assert facts.uverbs_usable
    assert [port.name for port in facts.host.ports] == ["mlx5_0:1", "mlx5_1:1"]
    assert facts.host.ports[0].gids == ((0, "IB/RoCE v1", "fe80::1"), (1, "RoCE v2", "::ffff:10.0.0.1"))
    assert facts.host.num_numa_nodes == 2


def test_an_empty_tree_is_read_without_a_complaint(tmp_path: Path) -> None:
    facts = read_facts(tmp_path)
    assert facts.host == topo.Host((), (), (), 0)
    assert (facts.cpu_quota_cores, facts.memory_limit_bytes, facts.clock_source) == (None, None, "")
    assert findings(facts)


def test_the_nearest_port_is_found_over_the_pci_tree(server: Path) -> None:
    host = topo.read_host(server)
    (gpu,) = host.accelerators
    assert gpu.name == "NVIDIA 0000:3b:00.0"
    near = topo.nearest(gpu, host.ports)
    assert near is not None and near.name == "mlx5_1:1"
    down = tuple(port._replace(state="1: DOWN") if port.name == "mlx5_1:1" else port for port in host.ports)
    near = topo.nearest(gpu, down)
    assert near is not None and near.name == "mlx5_0:1"
    shown = topo.text(host)
    assert "NVIDIA 0000:3b:00.0  NUMA 0  nearest port mlx5_1:1, 2 PCI hops" in shown
    assert "eth0  up  mtu 1500  100 Gb/s  0000:3c:00.0" in shown
    assert json.dumps(topo.as_dict(host))


def test_a_good_server_has_nothing_to_fix(server: Path) -> None:
    facts = dataclasses.replace(
        read_facts(server), pyverbs="release 59", pyverbs_problem="", max_locked_bytes=-1, max_fds=-1,
        clock_source="tsc", cpu_quota_cores=None, num_cores=8, rmem_max=1 << 30, wmem_max=1 << 30,
    )  # fmt: skip
    assert [f for f in findings(facts) if f.level in (FAIL, WARN) and f.what != "network eth0"] == []
    assert found(facts, "network eth0")[0].fix.startswith("ip link set eth0 mtu 9000")
    assert found(facts, "NVIDIA 0000:3b:00.0")[0].found == "nearest port mlx5_1:1"


@pytest.mark.parametrize(
    ("change", "what", "level", "fix"),
    [
        ({"is_linux": False}, "system", FAIL, "run it on Linux"),
        ({"num_cores": 1}, "cores", WARN, "two cores"),
        ({"num_cores": 4, "cpu_quota_cores": 2.0}, "CPU quota", WARN, "raise"),
        ({"governor": "powersave"}, "CPU governor", WARN, "performance"),
        ({"shm_problem": "this is aarch64"}, "shm", WARN, "memfd_create"),
        ({"max_fds": 1024}, "open files", WARN, "ulimit -n"),
        ({"rmem_max": 212992}, "net.core.rmem_max", INFO, "sysctl"),
        ({"pyverbs_problem": "not installed"}, "pyverbs", FAIL, "python3-pyverbs"),
        ({"uverbs": ()}, "/dev/infiniband", FAIL, "ib_uverbs"),
        ({"uverbs_usable": False}, "/dev/infiniband", FAIL, "group rdma"),
        ({"max_locked_bytes": 65536}, "locked memory", WARN, "ulimit -l"),
        ({"peermem": "", "has_cuda": False}, "GPU memory registration", WARN, "nvidia-peermem"),
        ({"peermem": "", "kernel_release": (5, 4)}, "GPU memory registration", WARN, "5.12"),
        ({"peermem": "", "kernel_release": (6, 1)}, "GPU memory registration", INFO, ""),
        ({"clock_source": "hpet"}, "clock", WARN, "tsc"),
    ],
)
def test_each_trouble_is_named_with_its_fix(
    server: Path, change: dict[str, object], what: str, level: str, fix: str
) -> None:
    (finding,) = found(dataclasses.replace(read_facts(server), **change), what)  # type: ignore[arg-type]
    assert finding.level == level
    assert fix in finding.fix
    assert finding.what in doctor.text([finding])


def test_ports_that_cannot_be_used(server: Path) -> None:
    facts = read_facts(server)
    ports = (
        facts.host.ports[0]._replace(state="1: DOWN"),
        facts.host.ports[1]._replace(gids=((0, "IB/RoCE v1", "fe80::1"),)),
    )
    facts = dataclasses.replace(facts, host=facts.host._replace(ports=ports))
    (down,) = found(facts, "port mlx5_0:1")
    assert (down.level, "ip link set eth-mlx5_0 up" in down.fix) == (WARN, True)
    active, no_gid = found(facts, "port mlx5_1:1")
    assert (active.level, no_gid.level) == (OK, FAIL)
    assert "address add" in no_gid.fix


@pytest.mark.parametrize("command", ["doctor", "topo"])
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_the_commands_run_on_this_host(command: str, form: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, *form]) in (0, 1)
    shown = capsys.readouterr().out
    assert json.loads(shown) if form else shown
