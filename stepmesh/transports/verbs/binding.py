"""Finds pyverbs on this machine, or says why verbs cannot be spoken here.

pyverbs has to be the one of the installed rdma-core (its private symbols are versioned by release), so it is never a
dependency of this package: it comes with the distribution (python3-pyverbs) or the vendor's OFED. Releases from 44 on
work; what differs between them is told apart by feature, not by number.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from stepmesh.errors import TransportError
from stepmesh.transports.verbs.base import Verbs

_DEVICES = Path("/sys/class/infiniband")
_OLDEST = 44
_HOW_TO_INSTALL = "install the distribution's python3-pyverbs, of the same release as its rdma-core"


class VerbsUnavailable(TransportError):
    """This process cannot speak verbs; the message says why, and what to do."""


def load() -> Verbs:
    """The verbs of this machine. Raises VerbsUnavailable. Cheap where there is no RDMA device."""
    if not _DEVICES.is_dir() or not os.listdir(_DEVICES):
        raise VerbsUnavailable(f"no RDMA device ({_DEVICES} is empty or missing)")
    try:
        with _logging_left_alone():
            importlib.import_module("pyverbs.device")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "pyverbs":
            raise VerbsUnavailable(f"pyverbs is incomplete: {error}") from error
        raise VerbsUnavailable(f"pyverbs is not importable by this Python: {_HOW_TO_INSTALL}") from error
    except ImportError as error:
        # A pyverbs of another release names symbols such as IBVERBS_PRIVATE_59 that the installed library lacks.
        raise VerbsUnavailable(f"pyverbs does not fit the installed rdma-core ({error}): {_HOW_TO_INSTALL}") from error
    release = _release()
    if release and release < _OLDEST:
        raise VerbsUnavailable(f"pyverbs is of rdma-core {release}, at least {_OLDEST} is needed")
    device = importlib.import_module("stepmesh.transports.verbs.device")
    verbs: Verbs = device.PyVerbs(f"pyverbs of rdma-core {release or 'of unknown release'}")
    return verbs


@contextlib.contextmanager
def _logging_left_alone() -> Iterator[None]:
    """pyverbs gives the root logger a handler and a level when it is imported: both are the application's to choose."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        for handler in [handler for handler in root.handlers if handler not in handlers]:
            root.removeHandler(handler)
        root.setLevel(level)


def _release() -> int:
    """rdma-core's release, which is also pyverbs's; 0 when it cannot be told (Debian's package has no metadata)."""
    try:
        return int(metadata.version("pyverbs").split(".")[0])
    except (metadata.PackageNotFoundError, ValueError):
        pass
    # The library's real name ends with the release: libibverbs.so.1.14.44.0
    for line in Path("/proc/self/maps").read_text().splitlines():
        name = line.rpartition("/")[2]
        if name.startswith("libibverbs.so.1."):
            parts = name.split(".")
            if len(parts) >= 5 and parts[4].isdigit():
                return int(parts[4])
    return 0
