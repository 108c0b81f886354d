"""How `afd status` finds a running `afd up` on this host: one small private file per cluster, gone with it.

The file lies in a directory of mode 0700 under $XDG_RUNTIME_DIR (else the temporary directory), has mode 0600, holds
the coordinator's address and the cluster's secret, and names its supervisor by process id and start time, so that a
file left by a killed supervisor is recognised and removed.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import msgspec

from afd.errors import ConfigError


class RunInfo(msgspec.Struct, frozen=True):
    """What the supervisor leaves for `afd status`. started: process start time in clock ticks. secret: hex."""

    pid: int
    started: int
    coordinator: str
    secret: str
    url: str
    topology: str
    model: str
    ca_file: str = ""


PARTIAL = ".partial"


def run_directory() -> Path:
    """Where this user's run files lie (it exists only while there are any)."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if base and os.path.isdir(base):
        return Path(base) / "afd"
    return Path(tempfile.gettempdir()) / f"afd-{os.getuid()}"


def write_run_file(info: RunInfo) -> Path:
    """Write `<pid>.json`, readable by this user only; returns its path."""
    directory = run_directory()
    path = directory / f"{info.pid}.json"
    partial = path.with_suffix(PARTIAL)
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        _check_private(directory)
        partial.unlink(missing_ok=True)
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(msgspec.json.encode(info))
        partial.rename(path)
    except OSError as error:
        raise ConfigError(f"cannot write run file {path}: {error.strerror}") from error
    return path


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
    directory = run_directory()
    if not directory.exists():
        return []
    _check_private(directory)
    found = []
    for path in sorted(directory.glob("*.json")):
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


def _check_private(directory: Path) -> None:
    """The files name secrets: a directory that someone else made or may read is refused."""
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ConfigError(f"run directory {directory} is not private to this user; remove it")
