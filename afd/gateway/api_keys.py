"""API keys of the gateway's clients: one per line in a file; checked in constant time."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from afd.errors import ConfigError


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
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"gateway.api_keys_file {path}: cannot be read: {error}") from error
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise ConfigError(f"gateway.api_keys_file {path} has no key in it")
    return ApiKeys(keys)
