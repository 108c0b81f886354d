"""How much of the machine's cores others used meanwhile: a round that others disturbed says little of a pipeline.

Linux only: /proc. What virtual machines call stolen counts as used by others.
"""

from __future__ import annotations

import os
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def foreign_cpu_s() -> float:
    """Seconds of CPU since boot that were used by processes which are no descendants of this one. Only differences
    mean something; a descendant that ended meanwhile counts as foreign."""
    user, nice, system, _, _, irq, softirq, steal = (int(n) for n in Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal - _own_ticks()) / _TICKS_PER_S


def _own_ticks() -> int:
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has ended
            parents[int(entry.name)] = int(fields[1])
            ticks[int(entry.name)] = int(fields[11]) + int(fields[12])
    return sum(own for pid, own in ticks.items() if _descends(pid, parents))


def _descends(pid: int, parents: dict[int, int]) -> bool:
    while pid not in (0, os.getpid()):
        pid = parents.get(pid, 0)
    return pid != 0
