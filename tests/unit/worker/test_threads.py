"""Thread counts of a worker: alone or beside the other side."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import torch

from afd.ops.cpu.ops import CpuOps
from afd.ops.select import select
from afd.worker.threads import ThreadShare


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_all_cores_alone_and_the_share_beside_others() -> None:
    threads = ThreadShare(1, 2)
    assert threads.alone_ratio == 2.0 and torch.get_num_threads() == 1
    threads.start("", select("cpu", "bfloat16").start_threads)
    assert torch.get_num_threads() == 1
    for alone, count in ((True, 2), (True, 2), (False, 1), (True, 2)):
        threads.use(alone=alone)
        assert torch.get_num_threads() == count


def test_never_fewer_alone_than_beside_others() -> None:
    threads = ThreadShare(2, 0)
    assert threads.alone_ratio == 1.0
    threads.use(alone=True)
    assert torch.get_num_threads() == 2


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_helping_thread_runs_beside_the_main_thread() -> None:
    ops = select("cpu", "bfloat16")
    ops.close()  # threads of other tests have their places already
    if not isinstance(ops, CpuOps):
        pytest.skip("no native kernels: no threads of their own")
    first, *others = sorted(os.sched_getaffinity(0))
    seen: list[set[int]] = []

    def main_thread() -> None:
        before = set(os.listdir("/proc/self/task"))
        ThreadShare(1, 2).start(str(first), ops.start_threads)
        started = set(os.listdir("/proc/self/task")) - before
        seen.append(os.sched_getaffinity(0))
        seen.extend(os.sched_getaffinity(int(thread)) for thread in started)

    thread = threading.Thread(target=main_thread)
    thread.start()
    thread.join()
    ops.close()
    assert seen[0] == {first}
    assert len(seen) > 1 and all(cores == set(others) for cores in seen[1:])
