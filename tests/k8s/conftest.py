"""What the processes really export: the metric names of a running 1A1F cluster, its coordinator, the autoscaler."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from afd.cluster.autoscale.metrics import AutoscaleMetrics
from afd.coordinator.metrics import CoordinatorMetrics
from tests.e2e.local_cluster import LocalCluster

SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("", "_sum", "_count")}


def names_in(text: str) -> Iterator[str]:
    """Every series name that a /metrics page declares; families without a sample yet count, too."""
    for name, kind in re.findall(r"^# TYPE (\S+) (\w+)$", text, re.MULTILINE):
        yield from (name + suffix for suffix in SUFFIXES.get(kind, ("",)))


@pytest.fixture(scope="session")
def live_metric_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    own = CollectorRegistry()
    AutoscaleMetrics(own)
    CoordinatorMetrics(own)
    names = set(names_in(generate_latest(own).decode()))
    folder = tmp_path_factory.mktemp("live")
    with LocalCluster(folder, "--topology", "1A1F", "--model", "dummy:step3-tiny", "--kv-cache-gib", "0.1") as cluster:
        addresses = {one["member"]["info"]["metrics"] for one in cluster.status()["members"]}
        assert len(addresses) == 3, addresses
        for address in addresses:
            names |= set(names_in(httpx.get(f"http://{address}/metrics").text))
    return names
