"""Thread counts of a worker: alone or beside the other side."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from afd.model.threads import ThreadShare


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_all_cores_alone_and_the_share_beside_others() -> None:
    threads = ThreadShare(1, 2)
    assert threads.faster_alone and torch.get_num_threads() == 1
    threads.start()
    assert torch.get_num_threads() == 1
    for alone, count in ((True, 2), (True, 2), (False, 1), (True, 2)):
        threads.use(alone=alone)
        assert torch.get_num_threads() == count


def test_never_fewer_alone_than_beside_others() -> None:
    threads = ThreadShare(2, 0)
    assert not threads.faster_alone
    threads.use(alone=True)
    assert torch.get_num_threads() == 2
