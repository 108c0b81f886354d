"""What a request's head must be for its message to have one end only, and one host (RFC 9110, RFC 9112).

llhttp checks the syntax. Here is what it leaves to its user: everything about which two ends could disagree is refused.
Pure: header names come in lower case, values without white space around them.
"""

from __future__ import annotations

import re

from afd.errors import RequestError

Headers = list[tuple[bytes, bytes]]

_HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[\w.~!$&'()*+,;=%-]*)(?::[0-9]{0,5})?", re.ASCII)
_AUTHORITY = re.compile(rb"https?://([^/?#]*)", re.IGNORECASE)
_MAX_LENGTH_DIGITS = 18


def check_head(method: bytes, target: bytes, version: str, headers: Headers) -> None:
    """RequestError with the status that RFC 9110 names; the connection must be closed then.

    target: as it came, "/path?query", "*" or an absolute URI.
    version: "major.minor".
    """
    if version not in ("1.0", "1.1"):
        raise _refused(f"HTTP/{version} is not served here, only HTTP/1.1 and HTTP/1.0", 505)
    if method == b"CONNECT":
        raise _refused("CONNECT is not served here")
    _check_host(target, version, [value for name, value in headers if name == b"host"])
    _check_length(version, headers)
    for name, value in headers:
        if name == b"expect" and value.lower() != b"100-continue":
            raise _refused("only 100-continue can be expected here", 417)


def framing_head(headers: Headers) -> bytes:
    """A head that frames a body in the same way as `headers` do, and says nothing else."""
    kept = [b"%s: %s\r\n" % field for field in headers if field[0] in (b"content-length", b"transfer-encoding")]
    return b"POST / HTTP/1.1\r\n" + b"".join(kept) + b"\r\n"


def _check_host(target: bytes, version: str, hosts: list[bytes]) -> None:
    if len(hosts) > 1:
        raise _refused("a request has one Host header, not several")
    if not hosts:
        if version == "1.1":
            raise _refused("an HTTP/1.1 request needs a Host header")
        return
    if not _HOST.fullmatch(hosts[0]):
        raise _refused("the Host header is not a host")
    absolute = _AUTHORITY.match(target)
    if absolute is not None and absolute[1].lower() != hosts[0].lower():
        raise _refused("the request's URI and its Host header name different hosts")


def _check_length(version: str, headers: Headers) -> None:
    lengths = [value for name, value in headers if name == b"content-length"]
    codings = [value for name, value in headers if name == b"transfer-encoding"]
    if codings:
        if version == "1.0":
            raise _refused("HTTP/1.0 has no Transfer-Encoding")
        if lengths:
            raise _refused("Content-Length and Transfer-Encoding exclude each other")
        if [coding.lower() for coding in codings] != [b"chunked"]:
            raise _refused("the only Transfer-Encoding here is chunked", 501)
    if len(lengths) > 1 or not all(
        value.isdigit() and value.isascii() and len(value) <= _MAX_LENGTH_DIGITS for value in lengths
    ):
        raise _refused("Content-Length must be one number")


def _refused(message: str, status: int = 400) -> RequestError:
    return RequestError(message, code="invalid_http", status=status)
