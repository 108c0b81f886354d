"""What keeps web pages of others away from a gateway that asks for no key. Pure.

A page on any site can make its visitor's browser send requests to this host: straight (a form or fetch with text/plain
needs nobody's consent), or under a name of its own that it lets point here (DNS rebinding), and then read the answers
too. With API keys neither works, and nothing is checked.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from afd.config import GatewayConfig
from afd.errors import RequestError

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class BrowserGuard:
    """Checks requests by their headers. hosts: names that a request may be for; None = any."""

    def __init__(self, hosts: frozenset[str] | None):
        self._hosts = hosts

    @classmethod
    def of(cls, config: GatewayConfig) -> BrowserGuard:
        """The guard of a gateway without keys: it checks names where that listens on loopback or some are set."""
        named = frozenset(name.strip().lower() for name in config.allowed_hosts.split(",") if name.strip())
        if not named and not _is_loopback(config.host):
            return cls(None)
        return cls(named | {config.host.strip("[]").lower()})

    def check(self, method: str, headers: Mapping[bytes, bytes]) -> None:
        """RequestError: 421 for an unknown Host, 403 for what another site's page made a browser send."""
        host = headers.get(b"host", b"").decode("latin-1")
        if self._hosts is not None and host and not self._known(_name_of(host)):
            raise RequestError(
                f"there is no {host[:100]} here; a gateway without API keys only answers to the names of this host and "
                "those in gateway.allowed_hosts",
                code="unknown_host",
                status=421,
            )
        if method not in _SAFE_METHODS and _is_cross_site(host, headers):
            raise RequestError(
                "a page of another site sent this, which a gateway without API keys refuses (gateway.api_keys_file)",
                code="cross_site",
                status=403,
            )

    def _known(self, name: str) -> bool:
        """An address can be no name that somebody lets point here; probes and scrapers use addresses."""
        assert self._hosts is not None
        return name in self._hosts or _is_local_name(name) or _address(name) is not None


def _is_cross_site(host: str, headers: Mapping[bytes, bytes]) -> bool:
    """Whether another site's page sent it. Browsers say so, pages cannot forge it, and other clients say nothing."""
    site = headers.get(b"sec-fetch-site")
    if site is not None:
        return site not in (b"same-origin", b"none")
    origin = headers.get(b"origin")
    return origin is not None and origin.decode("latin-1").partition("://")[2].lower() != host.lower()


def _name_of(host: str) -> str:
    """The Host header without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_loopback(name: str) -> bool:
    address = _address(name)
    return _is_local_name(name) or (address is not None and address.is_loopback)


def _is_local_name(name: str) -> bool:
    name = name.lower().rstrip(".")
    return name == "localhost" or name.endswith(".localhost")


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return None
