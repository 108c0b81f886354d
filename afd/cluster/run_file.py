"""How `afd status` finds a running `afd up` on this host: one small private file per cluster, gone with it.

The file lies in a directory of mode 0700 under $XDG_RUNTIME_DIR (else the temporary directory), has mode 0600, holds
the coordinator's address and the cluster's secret, and names its supervisor by process id and start time, so that a
file left by a killed supervisor is recognised and removed. Anybody may have taken that directory's name in a shared
temporary directory: then the file lies in a fresh directory there, which is looked into as well.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from afd.errors import ConfigError

log = logging.getLogger(__name__)


class RunInfo(msgspec.Struct, frozen=True):
    """What the supervisor leaves for `afd status`.

    started: process start time in clock ticks.
    secret: hex.
    """

    pid: int
    started: int
    coordinator: str
    secret: str
    url: str
    topology: str
    model: str
    ca_file: str = ""


PARTIAL = ".partial"
_FRESH_PREFIX = f"afd-{os.getuid()}-"


def run_directory() -> Path:
    """The directory of this user's run files; it exists only while there are any."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if base and os.path.isdir(base):
        return Path(base) / "afd"
    return Path(_temporary_directory()) / f"afd-{os.getuid()}"


def new_run_file() -> Path:
    """Path of this process's run file, `<pid>.json`, in a private directory, which is made if need be.

    ConfigError where there can be none.
    """
    directory = run_directory()
    try:
        _make_private(directory)
    except OSError as error:
        try:
            fresh = Path(tempfile.mkdtemp(prefix=_FRESH_PREFIX, dir=_temporary_directory()))
        except OSError as second:
            raise ConfigError(
                f"no private directory for the run file: {directory}: {error.strerror}, and none can be made in "
                f"{_temporary_directory()}: {second.strerror}; set XDG_RUNTIME_DIR to a directory of yours"
            ) from None
        log.warning("%s: %s; this cluster's run file is in %s", directory, error.strerror, fresh)
        directory = fresh
    return directory / f"{os.getpid()}.json"


def write_run_file(path: Path, info: RunInfo) -> None:
    """Write the file, readable by this user only, at a path that `new_run_file` gave."""
    partial = path.with_suffix(PARTIAL)
    try:
        _make_private(path.parent)  # again: the last of the others that used it may have removed it
        partial.unlink(missing_ok=True)
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(msgspec.json.encode(info))
        partial.rename(path)
    except OSError as error:
        raise ConfigError(f"cannot write run file {path}: {error.strerror}") from error


def remove_run_file(path: str | Path) -> None:
    """Remove a run file, also a half-written one, and the directory when it was the last. Idempotent."""
    path = Path(path)
    for name in (path.with_suffix(PARTIAL), path):
        name.unlink(missing_ok=True)
    try:
        path.parent.rmdir()
    except OSError:
        return  # others are still in it


def running_clusters() -> list[RunInfo]:
    """The clusters of this user on this host, oldest first; files of dead supervisors are removed on the way."""
    found = []
    for path in [path for directory in _private_directories() for path in sorted(directory.glob("*.json"))]:
        try:
            info = msgspec.json.decode(path.read_bytes(), type=RunInfo)
        except (OSError, msgspec.MsgspecError):
            continue
        if process_start_time(info.pid) == info.started:
            found.append(info)
        else:
            remove_run_file(path)
    return sorted(found, key=lambda info: info.started)


def process_start_time(pid: int) -> int:
    """Start time of a process in clock ticks since boot; 0 when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[19])


def _temporary_directory() -> str:
    try:
        return tempfile.gettempdir()
    except OSError:  # nothing can be written anywhere: the write will fail, and say so
        return "/tmp"


def _private_directories() -> Iterator[Path]:
    """Directories that may hold this user's run files; names taken by others, or open to them, are passed over."""
    for directory in (run_directory(), *sorted(Path(_temporary_directory()).glob(f"{_FRESH_PREFIX}*"))):
        try:
            if _is_private(directory):
                yield directory
        except OSError:
            continue  # it does not exist, or is on its way out


def _make_private(directory: Path) -> None:
    """OSError where it is, or becomes, not this user's alone: the files name secrets."""
    directory.mkdir(mode=0o700, exist_ok=True)
    if not _is_private(directory):
        raise PermissionError(errno.EACCES, "not private to this user")


def _is_private(directory: Path) -> bool:
    status = directory.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
