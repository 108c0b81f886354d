"""The pure parts of the verbs transport: port and GID, MTU, send queue account, names of statuses, configuration."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepmesh import ConfigError, TransportError
from stepmesh.config import VerbsOptions
from stepmesh.transports.verbs import binding
from stepmesh.transports.verbs.base import Gid, GidKind, Port
from stepmesh.transports.verbs.ledger import SendLedger
from stepmesh.transports.verbs.selection import common_mtu, pci_distance, select
from stepmesh.transports.verbs.status import explain, status_name
from tests.fakes.verbs import port

NEAR = "/sys/devices/pci0000:3a/0000:3a:00.0/0000:3b:00.0"
NEARBY = "/sys/devices/pci0000:3a/0000:3a:00.0/0000:3c:00.0"
FAR = "/sys/devices/pci0000:ba/0000:ba:00.0/0000:bb:00.0"
NO_OPTIONS = VerbsOptions()


def test_the_port_with_the_ranks_own_address_is_taken() -> None:
    ports = [port("mlx5_0"), port("mlx5_1", address="::ffff:10.0.0.2")]
    chosen = select(ports, NO_OPTIONS, "10.0.0.2")
    assert (chosen.port.device, chosen.gid.address) == ("mlx5_1", "::ffff:10.0.0.2")
    assert "has this rank's address 10.0.0.2" in chosen.reason


def test_without_a_match_the_nearest_to_the_gpu_is_taken() -> None:
    ports = [replace(port("mlx5_0"), pci_path=FAR), replace(port("mlx5_1"), pci_path=NEARBY)]
    chosen = select(ports, VerbsOptions(near="0000:3b:00.0"), "a-host-name", NEAR)
    assert chosen.port.device == "mlx5_1"
    assert "nearest to 0000:3b:00.0" in chosen.reason


def test_hardware_goes_before_software_and_names_decide_the_rest() -> None:
    ports = [port("rxe0"), replace(port("mlx5_1"), pci_path=FAR), replace(port("mlx5_0"), pci_path=FAR)]
    assert select(ports, NO_OPTIONS, "127.0.0.1").port.device == "mlx5_0"


def test_a_port_named_in_the_configuration_is_taken() -> None:
    ports = [port("mlx5_0"), port("mlx5_0", 2), port("mlx5_1")]
    assert select(ports, VerbsOptions(device="mlx5_1"), "10.0.0.1").port.device == "mlx5_1"
    chosen = select(ports, VerbsOptions(device="mlx5_0:2"), "10.0.0.1")
    assert (chosen.port.number, "named in the configuration" in chosen.reason) == (2, True)


def test_roce_v2_on_ipv4_is_the_preferred_gid() -> None:
    gids = (
        Gid(0, GidKind.ROCE_V1, "fe80::1"),
        Gid(1, GidKind.ROCE_V2, "fe80::1"),
        Gid(2, GidKind.ROCE_V1, "::ffff:10.0.0.1"),
        Gid(3, GidKind.ROCE_V2, "2001:db8::1"),
        Gid(4, GidKind.ROCE_V2, "::ffff:10.0.0.1"),
    )
    several = replace(port(), gids=gids)
    assert select([several], NO_OPTIONS, "elsewhere").gid.number == 4
    assert select([replace(several, gids=gids[:4])], NO_OPTIONS, "elsewhere").gid.number == 3
    assert select([replace(several, gids=gids[:3])], NO_OPTIONS, "elsewhere").gid.number == 1
    assert select([several], VerbsOptions(gid_index=2), "10.0.0.1").gid.number == 2
    assert select([several], NO_OPTIONS, "2001:db8::1").gid.number == 3


def test_infiniband_takes_its_first_gid() -> None:
    gids = (Gid(0, GidKind.INFINIBAND, "fe80::2"), Gid(1, GidKind.INFINIBAND, "2001:db8::2"))
    assert select([replace(port(), ethernet=False, gids=gids)], NO_OPTIONS, "127.0.0.1").gid.number == 0


@pytest.mark.parametrize(
    ("ports", "options", "reason"),
    [
        ([], NO_OPTIONS, "no RDMA device"),
        ([port("mlx5_0")], VerbsOptions(device="mlx5_7"), r"no RDMA port 'mlx5_7' here \(there are mlx5_0:1\)"),
        ([port("mlx5_0", active=False)], NO_OPTIONS, "mlx5_0:1 is not active"),
        ([port("mlx5_0", address="")], NO_OPTIONS, "mlx5_0:1 has no RoCE GID"),
        ([port("mlx5_0")], VerbsOptions(gid_index=9), "mlx5_0:1 has no GID 9"),
    ],
)
def test_a_host_without_a_usable_port_says_why(ports: list[Port], options: VerbsOptions, reason: str) -> None:
    with pytest.raises(TransportError, match=reason):
        select(ports, options, "127.0.0.1")


def test_mtu_is_what_both_ends_and_the_configuration_allow() -> None:
    assert common_mtu(5, 3, 0) == 3
    assert common_mtu(5, 5, 1024) == 3
    assert common_mtu(5, 5, 4096) == 5
    assert common_mtu(1, 5, 4096) == 1


def test_pci_distance_counts_what_is_not_shared() -> None:
    assert pci_distance(NEAR, NEAR) == 0
    assert pci_distance(NEAR, NEARBY) == 2
    assert pci_distance(NEAR, FAR) == 6
    assert pci_distance("", NEAR) > pci_distance(FAR, NEAR)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(4, 64), st.lists(st.tuples(st.sampled_from([1, 2]), st.integers(0, 3)), max_size=200))
def test_a_send_queue_is_never_overrun_and_never_stuck(depth: int, steps: list[tuple[int, int]]) -> None:
    """The device's side of the account: entries come back with signalled completions only."""
    ledger = SendLedger(depth, per_frame=2)
    taken = 0
    signalled: list[int] = []
    for num_requests, polled in steps:
        if ledger.has_room(num_requests):
            taken += num_requests
            assert taken <= depth
            if covered := ledger.post(num_requests):
                signalled.append(covered)
        else:
            assert signalled, "full, and no completion will ever come"
        for _ in range(min(polled, len(signalled))):
            covered = signalled.pop(0)
            taken -= covered
            ledger.completed(covered)
        assert ledger.taken == taken


def test_a_probe_is_covered_by_its_own_signal() -> None:
    ledger = SendLedger(16, per_frame=2)
    assert ledger.post_alone() == 1
    assert ledger.post(2) == 0
    assert ledger.post_alone() == 3
    ledger.completed(1)
    ledger.completed(3)
    assert ledger.taken == 0


def test_statuses_have_names_and_causes() -> None:
    assert status_name(12) == "IBV_WC_RETRY_EXC_ERR (12)"
    assert "does not acknowledge" in explain(12)
    assert explain(7) == "IBV_WC_BAD_RESP_ERR (7)"
    assert explain(99) == "IBV_WC_UNKNOWN (99)"


def test_options_out_of_range_are_all_named() -> None:
    with pytest.raises(ConfigError) as error:
        VerbsOptions(mtu_bytes=1500, timeout=40, retry_count=8, service_level=16, gid_index=-2)
    for name in ("mtu_bytes 1500", "timeout 40", "retry_count 8", "service_level 16", "gid_index -2"):
        assert name in str(error.value)


def test_a_host_without_rdma_devices_says_so(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(binding, "_DEVICES", tmp_path / "nothing")
    with pytest.raises(binding.VerbsUnavailable, match="no RDMA device"):
        binding.load()


def test_the_import_of_pyverbs_does_not_configure_logging(
    tmp_path,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "mlx5_0").mkdir()
    monkeypatch.setattr(binding, "_DEVICES", tmp_path)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def configure(name: str) -> None:
        root.addHandler(logging.StreamHandler())
        root.setLevel(logging.INFO)
        raise ImportError("enough seen")

    monkeypatch.setattr(binding.importlib, "import_module", configure)
    with pytest.raises(binding.VerbsUnavailable):
        binding.load()
    assert (root.handlers, root.level) == (handlers, level)


def test_a_pyverbs_older_than_those_that_work_is_refused(
    tmp_path,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "mlx5_0").mkdir()
    monkeypatch.setattr(binding, "_DEVICES", tmp_path)
    monkeypatch.setattr(binding.importlib, "import_module", lambda name: None)
    monkeypatch.setattr(binding.metadata, "version", lambda name: "28.0")
    with pytest.raises(binding.VerbsUnavailable, match="of rdma-core 28, at least 44 is needed"):
        binding.load()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("no", name="pyverbs"), "not importable by this Python: install"),
        (ModuleNotFoundError("no", name="pyverbs.device"), "not importable by this Python: install"),
        (ModuleNotFoundError("no numbers", name="numbers2"), "pyverbs is incomplete"),
        (ImportError("version `IBVERBS_PRIVATE_59' not found"), "does not fit the installed rdma-core .*PRIVATE_59"),
    ],
)
def test_a_pyverbs_that_is_missing_or_of_another_release_says_so(
    tmp_path,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
    error: ImportError,
    reason: str,
) -> None:
    (tmp_path / "mlx5_0").mkdir()
    monkeypatch.setattr(binding, "_DEVICES", tmp_path)

    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(binding.importlib, "import_module", fail)
    with pytest.raises(binding.VerbsUnavailable, match=reason):
        binding.load()
