"""The limit on open files: every process raises its own as far as it may, and says when that is too little."""

from __future__ import annotations

import contextlib
import logging
import resource

log = logging.getLogger(__name__)

OWN_FILES = 128
"""What a process opens for itself: libraries, logs, the event loop, its connections within the cluster."""
UNLIMITED = 1 << 20  # as many as are ever counted on where there is no limit


def raise_open_files() -> int:
    """Raise this process's soft limit to its hard one, which children inherit; returns what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        for wanted in (hard, 10_240):  # macOS takes no "unlimited" here, only OPEN_MAX
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
                break
    return open_files_limit()


def open_files_limit() -> int:
    """The soft limit of this process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return UNLIMITED if soft == resource.RLIM_INFINITY else min(soft, UNLIMITED)


def want_open_files(needed: int, what_for: str) -> None:
    """Raise the limit, and log a warning when `what_for` needs more than that."""
    limit = raise_open_files()
    if limit < needed:
        log.warning("%s", too_few_files(limit, needed, what_for))


def too_few_files(limit: int, needed: int, what_for: str) -> str:
    """The sentence that says what is missing and how to raise it."""
    return (
        f"{what_for} needs {needed} open files, the limit is {limit}: raise the hard limit (ulimit -Hn {needed}; "
        f"LimitNOFILE={needed} in a systemd unit; --ulimit nofile={needed} of a container)"
    )
