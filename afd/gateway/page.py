"""The page at "/": its file, and the headers that let a browser run only what is in it."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

NOTHING = "'none'"
_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def load_page() -> tuple[bytes, dict[str, str]]:
    """The page and its headers."""
    page = (resources.files("afd.gateway") / "static" / "index.html").read_bytes()
    return page, {"content-security-policy": content_policy(page.decode()), "x-content-type-options": "nosniff"}


def content_policy(page: str) -> str:
    """Content-Security-Policy: the page's own scripts and styles only, by hash; this server only; in nobody's frame."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in _INLINE.findall(page):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {' '.join(hashes['script']) or NOTHING}",
            f"style-src {' '.join(hashes['style']) or NOTHING}",
            "connect-src 'self'",
            "img-src 'self' data:",
            "frame-ancestors 'none'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
