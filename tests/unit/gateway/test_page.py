"""The page's headers follow from its file."""

from __future__ import annotations

import base64
import hashlib
import re

from afd.gateway.page import content_policy, load_page


def test_only_what_is_in_the_page_runs() -> None:
    page, headers = load_page()
    directives = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    text = page.decode()
    for kind in ("script", "style"):
        (inline,) = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert directives[f"{kind}-src"] == f"'sha256-{digest}'"
        assert text.count(f"<{kind}") == 1
    assert "unsafe" not in headers["content-security-policy"]
    for name in ("default-src", "frame-ancestors", "base-uri", "form-action"):
        assert directives[name] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<[^>]* (on\w+|style)=", text), "a policy with hashes blocks handlers and styles in tags"


def test_another_page_has_another_hash() -> None:
    assert content_policy("<script>1</script>") != content_policy("<script>2</script>")
    assert content_policy("<p>").count("'none'") == 6
