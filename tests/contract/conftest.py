"""One world per test and transport, closed and checked for leaks afterwards."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tests.contract.world import Holdings, World

TRANSPORTS = ("inproc", "shm", "tcp", "verbs")


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def world(transport: str) -> Iterator[World]:
    gc.collect()  # what other tests left in circles may go now, not meanwhile
    before = Holdings.now()
    world = World(transport)
    yield world
    world.close()
    # Without a run of the garbage collector: descriptors and mappings are freed by close itself.
    assert Holdings.now() == before
