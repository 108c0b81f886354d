"""Cores for the workers' main threads.

A worker that wakes its partner is, to the kernel, a reason to run the partner on the same core, which takes that core
from the waker in the middle of its stage, while the partner's own core stays idle (one exchange in ten on two cores).
So each main thread keeps to a core of its own. The threads that help it to compute keep away from that core: woken
there they would take turns with it, and both be late, until the kernel moves one of them some milliseconds later. Side
threads go where there is room.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence, Set

log = logging.getLogger(__name__)


def share_cores(cores: Sequence[int], num_workers: int, usable: int) -> list[str]:
    """An equal share of `cores` for each worker of this host, as `afd.config.parse_cores` reads it.

    usable: how many of them may be busy at a time. Where workers would have to share one: "" for all of them.
    """
    share = min(len(cores), usable) // num_workers if num_workers else 0
    return [",".join(map(str, cores[i * share : (i + 1) * share])) for i in range(num_workers)]


def thread_cores(own: Set[int], everywhere: Set[int]) -> tuple[Set[int], Set[int], Set[int]]:
    """Cores of a worker's main thread, of the threads that always help it, and of those that do while others wait.

    own: the worker's; none: all three may run `everywhere`.
    """
    if not own:
        return everywhere, everywhere, everywhere
    main = {min(own)}
    near = own - main or main
    return main, near, everywhere - own or near


def pin_this_thread(cores: Set[int]) -> None:
    """Keep the calling thread, and threads that it starts from now on, to these cores; a warning where it cannot be."""
    if not cores or not hasattr(os, "sched_setaffinity"):
        return
    try:
        os.sched_setaffinity(threading.get_native_id(), cores)
    except OSError as error:
        log.warning(
            "cannot keep to cores %s (%s): the kernel decides", ",".join(map(str, sorted(cores))), error.strerror
        )


def cores_of_this_thread() -> Set[int]:
    """Cores on which the calling thread may run; none where the system does not tell."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
