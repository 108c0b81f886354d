"""These tests need RDMA devices with a real stack behind them: `make test-rdma` runs them in a guest with Soft-RoCE."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from stepmesh.transports.verbs import binding
from stepmesh.transports.verbs.base import Verbs
from tests.contract.world import RDMA_DEVICES, Holdings, World


@pytest.fixture(autouse=True)
def verbs() -> Verbs:
    if not RDMA_DEVICES:
        pytest.skip("no RDMA devices named: run `make test-rdma`")
    return binding.load()


@pytest.fixture
def world(verbs: Verbs) -> Iterator[World]:
    before = Holdings.now()
    world = World("verbs")
    yield world
    world.close()
    assert Holdings.now() == before
