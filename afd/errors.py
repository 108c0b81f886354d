"""Error tree: every error says whose fault it is, whether to retry, and what to do.

Rule: an `AfdError` message is one line that a user can act on. Asserts are for our own bugs.
"""

from __future__ import annotations


class AfdError(Exception):
    """Base of all errors that AFD raises on purpose."""


class ConfigError(AfdError):
    """The configuration (flag, TOML key, value) is wrong: the user fixes it, a retry does not help."""


class ModelError(AfdError):
    """The model folder or file cannot be served: names file, tensor, expected and found shape."""


class RequestError(AfdError):
    """The client's request is wrong (HTTP 400 or 404).

    param: name of the offending request field, when there is one.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


class UnavailableError(AfdError):
    """The cluster cannot take the request now (HTTP 503); the client may retry after `retry_after_s`."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0, code: str = "unavailable"):
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.code = code


class PeerLostError(AfdError):
    """A worker died or cannot be reached; names the rank. Its requests end or migrate."""


class DeviceError(AfdError):
    """A GPU has stopped working: the worker ends, and is started again."""


class CoordinatorError(AfdError):
    """The coordinator refused a call (wrong secret, other model, rank taken): says which and why."""
