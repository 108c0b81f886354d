"""The default model, each role and several at once, pauses of 4 and 10 s (make test-matrix; minutes)."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import SMOLLM2
from tests.e2e.local_cluster import LocalCluster
from tests.e2e.pauses import EVERYTHING, check_pause

NUM_TOKENS = 60
ROLES = ("gateway", "coordinator", "attention", "ffn", "gateway coordinator", "coordinator attention", EVERYTHING)


@pytest.mark.timeout(900)
@pytest.mark.matrix
@pytest.mark.parametrize("topology", ["1A1F", "2A1F"])
@pytest.mark.parametrize("pause_s", [4.0, 10.0])
def test_every_stream_ends_complete_and_right(topology, pause_s, tmp_path, reference):
    with LocalCluster(tmp_path, "--dtype", "float32", "--topology", topology) as cluster:
        for roles in ROLES:
            check_pause(cluster, reference, SMOLLM2, roles, pause_s, NUM_TOKENS)
