"""The cluster's secret: read from a file that every process of the cluster holds, or drawn for one run of `afd up`."""

from __future__ import annotations

import logging
import os
import secrets
from pathlib import Path

from afd.errors import ConfigError
from afd.messages.keys import MIN_SECRET_BYTES, warn_of_mode

log = logging.getLogger(__name__)

MAX_SECRET_BYTES = 4096
MIN_DIFFERENT_BYTES = 5  # 16 random ones have more, also in hex


def new_secret() -> bytes:
    """A fresh secret."""
    return secrets.token_bytes(32)


def read_secret(path: str) -> bytes:
    """The file's content without surrounding white space; ConfigError when unreadable, too short or too long."""
    try:
        with Path(path).open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(MAX_SECRET_BYTES + 1).strip()
    except OSError as error:
        raise ConfigError(f"cannot read secret file {path}: {error.strerror}") from error
    if not MIN_SECRET_BYTES <= len(data) <= MAX_SECRET_BYTES:
        raise ConfigError(
            f"secret file {path} holds {len(data)} bytes; {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} are needed "
            f"(make one: head -c 32 /dev/urandom | base64 > {path})"
        )
    if len(set(data)) < MIN_DIFFERENT_BYTES:
        log.warning("secret file %s holds a few bytes over and over, which can be guessed", path)
    warn_of_mode(mode, f"secret file {path}")
    return data


def require_secret(path: str) -> bytes:
    """The secret of a process that joins others. ConfigError without a file: there is nothing to share."""
    if not path:
        raise ConfigError(
            "--secret-file is needed: the same file for every process of the cluster "
            "(make one: head -c 32 /dev/urandom | base64 > afd.secret; chmod 600 afd.secret)"
        )
    return read_secret(path)
