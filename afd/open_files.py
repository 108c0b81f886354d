"""The limit on open files: every process raises its own as far as it may, and says when that is too little."""

from __future__ import annotations

import contextlib
import logging
import resource

log = logging.getLogger(__name__)

UNLIMITED = 1 << 20  # as many as are ever counted on where there is no limit


def raise_open_files(needed: int, what_for: str) -> int:
    """Raise the soft limit on open files to the hard one; returns what it is then.

    Logs a warning when that is less than `needed`: `what_for` names what would not fit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        for wanted in (hard, needed):  # macOS refuses some hard limits as soft ones
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
                break
    limit = open_files_limit()
    if limit < needed:
        log.warning(
            "this process may open %d files, %s needs %d: raise the hard limit (ulimit -Hn %d; LimitNOFILE= of a "
            "systemd unit; --ulimit nofile=%d of a container)",
            limit,
            what_for,
            needed,
            needed,
            needed,
        )
    return limit


def open_files_limit() -> int:
    """The soft limit of this process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return UNLIMITED if soft == resource.RLIM_INFINITY else min(soft, UNLIMITED)
