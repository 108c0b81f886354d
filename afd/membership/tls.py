"""TLS of the coordinator's port, when certificates are given: PEM files in, gRPC credentials out.

Without them the calls are plain text and the bearer token protects against strangers only, not against listeners.
"""

from __future__ import annotations

from pathlib import Path

import grpc

from afd.config import CoordinatorConfig
from afd.errors import ConfigError


def server_credentials(config: CoordinatorConfig) -> grpc.ServerCredentials | None:
    """Credentials that the coordinator shows; None = plain text. ConfigError when a file cannot be read."""
    if not config.tls_cert_file:
        return None
    return grpc.ssl_server_credentials([(_read(config.tls_key_file), _read(config.tls_cert_file))])


def channel_credentials(ca_file: str) -> grpc.ChannelCredentials | None:
    """Credentials that a client trusts; None = plain text. ConfigError when the file cannot be read."""
    return grpc.ssl_channel_credentials(_read(ca_file)) if ca_file else None


def _read(path: str) -> bytes:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read TLS file {path}: {error.strerror}") from error
    if b"-----BEGIN " not in data:
        raise ConfigError(f"TLS file {path} is not in PEM form")
    return data
