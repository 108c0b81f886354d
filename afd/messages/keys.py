"""Keys of the cluster, each derived from one secret: HKDF-SHA256(secret, label). The secret itself is never sent.

Every process of a cluster holds the same secret and so derives the same keys without exchanging any of them.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import stat
from typing import NamedTuple

import zmq
from zmq.utils import z85

from afd.errors import ConfigError

log = logging.getLogger(__name__)

MIN_SECRET_BYTES = 16
_SALT = b"afd cluster secret v1"


class CurveKeypair(NamedTuple):
    """A CURVE key pair, both halves as 40 bytes of z85 (what libzmq takes)."""

    public: bytes
    secret: bytes


def warn_of_mode(mode: int, what: str) -> None:
    """Log a warning when others on this host may read or change a file of secrets. mode: st_mode of the open file."""
    if mode & (stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP):
        can = "changed" if mode & (stat.S_IWOTH | stat.S_IWGRP) else "read"
        log.warning("%s can be %s by others on this host: chmod 600 it", what, can)


def hkdf_sha256(key: bytes, salt: bytes, info: bytes, num_bytes: int) -> bytes:
    """RFC 5869, extract and expand."""
    pseudo_random_key = hmac.digest(salt, key, hashlib.sha256)
    derived, block, counter = b"", b"", 1
    while len(derived) < num_bytes:
        block = hmac.digest(pseudo_random_key, block + info + bytes([counter]), hashlib.sha256)
        derived += block
        counter += 1
    return derived[:num_bytes]


def derive_key(secret: bytes, label: str) -> bytes:
    """32 bytes for one use, which `label` names. ConfigError when the cluster secret is too short."""
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(f"the cluster secret has {len(secret)} bytes; it needs at least {MIN_SECRET_BYTES}")
    return hkdf_sha256(secret, _SALT, label.encode(), 32)


def grpc_token(secret: bytes) -> str:
    """Bearer token of calls to the coordinator (hex)."""
    return derive_key(secret, "grpc token").hex()


def trace_token(secret: bytes) -> str:
    """Bearer token for the traces of workers (hex)."""
    return derive_key(secret, "trace token").hex()


def mesh_key(secret: bytes) -> bytes:
    """HMAC key of stepmesh's mutual challenge, 32 bytes."""
    return derive_key(secret, "stepmesh hmac")


def zmq_keypair(secret: bytes, label: str) -> CurveKeypair:
    """CURVE key pair of one side of the serving sockets: label "worker" (servers) or "gateway" (clients)."""
    secret_key = z85.encode(derive_key(secret, f"zmq curve {label}"))
    return CurveKeypair(public=zmq.curve_public(secret_key), secret=secret_key)
