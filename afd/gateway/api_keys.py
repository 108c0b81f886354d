"""API keys of the gateway's clients: one per line in a file; checked in constant time."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
from pathlib import Path

from afd.errors import ConfigError
from afd.messages.keys import warn_of_mode

log = logging.getLogger(__name__)

MIN_KEY_CHARS = 16


class ApiKeys:
    """The accepted bearer tokens; none at all means that no key is asked for. Only digests are kept."""

    def __init__(self, keys: list[str]):
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @property
    def required(self) -> bool:
        return bool(self._digests)

    def accepts(self, authorization: bytes) -> bool:
        """authorization: the header's value. Every key is compared, so that timing tells nothing."""
        scheme, _, token = authorization.partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        digest = hashlib.sha256(token.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches)


def load_api_keys(path: str) -> ApiKeys:
    """File with a key per line ("#" begins a comment line); "" = no keys. ConfigError when unreadable or empty."""
    if not path:
        return ApiKeys([])
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            mode = os.fstat(file.fileno()).st_mode
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"gateway.api_keys_file {path}: cannot be read: {error}") from error
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise ConfigError(f"gateway.api_keys_file {path} has no key in it")
    num_short = sum(len(key) < MIN_KEY_CHARS for key in keys)
    if num_short:
        log.warning(
            "gateway.api_keys_file %s: %d of %d keys have fewer than %d characters and may be guessed "
            "(make one: openssl rand -hex 16)",
            path,
            num_short,
            len(keys),
            MIN_KEY_CHARS,
        )
    warn_of_mode(mode, f"gateway.api_keys_file {path}")
    return ApiKeys(keys)
