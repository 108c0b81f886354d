"""Who may ask a gateway without keys: the names of this host, clients that are no browsers, and its own page."""

from __future__ import annotations

import pytest

from afd.config import GatewayConfig
from afd.errors import RequestError
from afd.gateway.browser_guard import BrowserGuard


def refusal(
    host: str | None, method: str = "GET", *, listens: str = "127.0.0.1", allowed: str = "", **headers: str
) -> int:
    """The status, 0 when it is let in."""
    guard = BrowserGuard.of(GatewayConfig(host=listens, allowed_hosts=allowed))
    given = {name.replace("_", "-").encode(): value.encode("latin-1") for name, value in headers.items()}
    if host is not None:
        given[b"host"] = host.encode("latin-1")
    try:
        guard.check(method, given)
    except RequestError as error:
        return error.status
    return 0


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:8000",
        "LOCALHOST:1",
        "127.0.0.1:8000",
        "127.9.9.9",
        "[::1]:8000",
        "[::1]",
        "a.localhost:80",
    ],
)
def test_names_of_this_host(host: str) -> None:
    for listens in ("127.0.0.1", "::1", "localhost"):
        assert refusal(host, listens=listens) == 0


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "10.0.0.1.example",
        "[",
        "\xff",
    ],
)
def test_other_names_only_where_they_are_allowed(host: str) -> None:
    assert refusal(host) == 421
    assert refusal(host, "POST") == 421
    assert refusal(host, listens="0.0.0.0") == 0
    assert refusal(host, listens="0.0.0.0", allowed="other.example") == 421
    assert refusal("Evil.example:8000", allowed="other.example, evil.EXAMPLE") == 0
    assert refusal("localhost:8000", listens="0.0.0.0", allowed="evil.example") == 0


@pytest.mark.parametrize("host", ["10.0.0.1", "10.0.0.1:8000", "[fd00::2]:8000"])
def test_an_address_is_nobody_s_name(host: str) -> None:
    """Probes of a pod and scrapers use it, and no page can be called so."""
    for listens in ("127.0.0.1", "0.0.0.0", "10.0.0.1"):
        for allowed in ("", "gateway.example"):
            assert refusal(host, listens=listens, allowed=allowed) == 0


def test_a_client_without_a_host_is_no_browser() -> None:
    assert refusal(None) == 0


@pytest.mark.parametrize("listens", ["127.0.0.1", "0.0.0.0"])
def test_pages_of_other_sites_may_not_post(listens: str) -> None:
    host = "localhost:8000"
    for headers in (
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:9000"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
        {"sec_fetch_site": "cross-site", "origin": "http://localhost:8000"},
    ):
        assert refusal(host, "POST", listens=listens, **headers) == 403, headers
        assert refusal(host, "GET", listens=listens, **headers) == 0, headers
    for headers in (
        {},
        {"origin": "http://localhost:8000"},
        {"sec_fetch_site": "same-origin"},
        {"sec_fetch_site": "none"},
        {"sec_fetch_site": "same-origin", "origin": "https://chat.example"},  # behind a proxy that rewrites Host
    ):
        assert refusal(host, "POST", listens=listens, **headers) == 0, headers
