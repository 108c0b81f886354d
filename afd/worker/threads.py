"""How many threads compute: a worker's share while the other side works beside it, all cores while that waits for it.

With one stream in flight the halves take turns: the one that computes has the machine to itself. On a shared host
the other side's cores are then free, and half of every GEMM can run there. The kernels' results do not depend on the
number of threads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from afd.config import parse_cores
from afd.host.cores import cores_of_this_thread, pin_this_thread, thread_cores

_TORCH_GRAIN = 1 << 15  # elements below which torch does not split a row-wise operation over threads


def alone_ratio(shared: int, alone: int) -> float:
    """How many times the threads of a step beside others one alone has: at least 1. The numbers of `ThreadShare`."""
    return max(shared, alone) / shared


class ThreadShare:
    """Thread counts of one worker's process. Main thread only.

    shared: threads while the other side computes, too.
    alone: threads while it waits for us, at least as many.
    """

    def __init__(self, shared: int, alone: int):
        self._counts = (shared, max(shared, alone))
        self._current = shared
        torch.set_num_threads(shared)

    @property
    def alone_ratio(self) -> float:
        """See the function of that name."""
        return alone_ratio(*self._counts)

    def start(self, own_cores: str = "", start_threads: Callable[[int], None] | None = None) -> None:
        """Start the threads and give each its place: the caller, a worker's main thread, stays on a core of its own.

        own_cores: the worker's, as `afd.config.parse_cores` reads them.
        start_threads: `Ops.start_threads`; None = torch alone computes here.
        """
        shared, alone = self._counts
        main, near, far = thread_cores(parse_cores(own_cores), cores_of_this_thread())
        if alone > 1:
            for cores, count in ((near, shared), (far, alone)):
                pin_this_thread(cores)
                if start_threads is not None:
                    start_threads(count)
            pin_this_thread((near | far) - main or main)
            torch.set_num_threads(alone)
            torch.zeros(alone * _TORCH_GRAIN).add_(1.0)  # torch starts its own with its first large operation
            torch.set_num_threads(shared)
        pin_this_thread(main)

    def use(self, alone: bool) -> None:
        """Compute with that many threads from now on."""
        wanted = self._counts[alone]
        if wanted != self._current:
            torch.set_num_threads(wanted)
            self._current = wanted
