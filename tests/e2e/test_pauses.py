"""A process that stands still for seconds and goes on: every stream ends complete and right."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import STEP3_TINY
from tests.e2e.local_cluster import LocalCluster
from tests.e2e.pauses import EVERYTHING, check_pause

NUM_TOKENS = 40


@pytest.mark.timeout(300)
def test_streams_go_on_after_a_pause_of_the_only_gateway_or_attention_worker(tmp_path, reference):
    """4 s: beyond heartbeats and leases; whoever is declared lost meanwhile returns or is replaced."""
    options = ("--model", STEP3_TINY, "--dtype", "float32", "--topology", "1A1F")
    with LocalCluster(tmp_path, *options) as cluster:
        gateway = cluster.pid_of("gateway")
        for role in ("gateway", "attention"):
            check_pause(cluster, reference, STEP3_TINY, role, 4.0, NUM_TOKENS)
        assert cluster.pid_of("gateway") == gateway, "the gateway's process is another one"


@pytest.mark.timeout(300)
def test_streams_go_on_after_a_pause_of_several_at_once(tmp_path, reference):
    """Nobody takes the silence of its own pause for another's."""
    options = ("--model", STEP3_TINY, "--dtype", "float32", "--topology", "1A1F")
    with LocalCluster(tmp_path, *options) as cluster:
        for roles in (EVERYTHING, "attention ffn"):
            check_pause(cluster, reference, STEP3_TINY, roles, 4.0, NUM_TOKENS)
