"""How much a campaign does, from which seed, and what must be as before when it is over.

The suite runs a small sample with a fixed seed; `make fuzz` (AFD_FUZZ=full) runs the whole volume from a new seed. A
failure is repeated with the seed that it printed: AFD_FUZZ=full AFD_FUZZ_SEED=... pytest tests/fuzz -k name
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import random
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

FULL = os.environ.get("AFD_FUZZ") == "full"
SEED = int(os.environ.get("AFD_FUZZ_SEED", "1"))
MAX_GROWTH_MIB = 24.0  # of a campaign's second half; caches and arenas are warm by then
_PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def volume(full: int, sample: int) -> int:
    """Number of cases: all of them in `make fuzz`, a few in the suite."""
    return full if FULL else sample


def generator(name: str, num_cases: int) -> random.Random:
    """The campaign's source of randomness; prints what repeats it."""
    print(f"\nfuzz {name}: {num_cases} cases, AFD_FUZZ_SEED={SEED}")
    return random.Random(f"{SEED}/{name}")


@dataclasses.dataclass(frozen=True)
class Holdings:
    """What a process holds and must give back: descriptors by kind, threads by name."""

    fds: tuple[str, ...]
    threads: tuple[str, ...]

    @classmethod
    def now(cls) -> Holdings:
        gc.collect()
        fds = []
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # the one that lists the folder
                fds.append(os.readlink(f"/proc/self/fd/{name}").split(":")[0])
        names = [thread.name for thread in threading.enumerate() if not thread.name.startswith("asyncio_")]
        return cls(tuple(sorted(fds)), tuple(sorted(names)))  # without the event loop's own pool, which ends with it


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """Descriptors and threads are the same before and after."""
    before = Holdings.now()
    yield
    after = Holdings.now()
    left = Counter(after.fds) - Counter(before.fds) + Counter(after.threads) - Counter(before.threads)
    assert not left, f"left behind: {dict(left)}"


class MemoryGauge:
    """Resident memory over the second half of a campaign. Call `step` once per case."""

    def __init__(self, num_cases: int) -> None:
        self._half = max(1, num_cases // 2)
        self._cases = 0
        self._before_mib = 0.0

    def step(self) -> None:
        self._cases += 1
        if self._cases == self._half:
            self._before_mib = resident_mib()

    def check(self) -> None:
        grown = resident_mib() - self._before_mib
        assert grown < MAX_GROWTH_MIB, f"{grown:.1f} MiB more after the second half of {self._cases} cases"


def resident_mib() -> float:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_MIB
