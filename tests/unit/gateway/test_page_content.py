"""The page for people: every field has a label, news are announced, and nothing is asked of another host."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from importlib import resources

PAGE = (resources.files("afd.gateway") / "static" / "index.html").read_text(encoding="utf-8")
SCRIPT = re.search(r"<script>(.*?)</script>", PAGE, re.DOTALL).group(1)  # type: ignore[union-attr]


class Elements(HTMLParser):
    """Start tags, each with whether a label is around it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], bool]] = []
        self._labels = 0
        self.feed(PAGE)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._labels += tag == "label"
        self.found.append((tag, dict(attrs), self._labels > 0))

    def handle_endtag(self, tag: str) -> None:
        self._labels -= tag == "label"


ELEMENTS = Elements().found
IDS = {attrs["id"] for _, attrs, _ in ELEMENTS if "id" in attrs}


def test_every_field_has_a_label() -> None:
    fields = [(attrs, labelled) for tag, attrs, labelled in ELEMENTS if tag in ("input", "textarea")]
    assert len(fields) >= 4 and all(labelled for _, labelled in fields)


def test_what_changes_is_announced() -> None:
    by_id = {attrs["id"]: attrs for _, attrs, _ in ELEMENTS if "id" in attrs}
    assert by_id["log"]["aria-live"] == "polite" and by_id["summary"]["role"] == "status"
    assert by_id["key-error"]["role"] == "alert"
    for _, attrs, _ in ELEMENTS:
        assert attrs.get("aria-labelledby", "log") in IDS


def test_the_script_finds_what_it_looks_for() -> None:
    assert set(re.findall(r'\$\("([\w-]+)"\)', SCRIPT)) <= IDS


def test_the_key_outlives_a_reload_but_not_the_tab() -> None:
    assert "sessionStorage.setItem" in SCRIPT and "localStorage" not in SCRIPT


def test_nothing_is_asked_of_another_host_and_the_icon_of_nobody() -> None:
    links = [attrs.get("href") or attrs.get("src") or "" for _, attrs, _ in ELEMENTS if {"href", "src"} & attrs.keys()]
    assert [link.split(",")[0] for link in links] == ["data:image/svg+xml", "openapi.json", "metrics"]
    assert all(path.startswith(("cluster", "v1/")) for path in re.findall(r'call\("([^"]+)"', SCRIPT))


def test_the_models_own_sampling_is_used_unless_asked() -> None:
    assert "temperature:" not in SCRIPT and "top_p" not in SCRIPT
    assert 'if ($(name).value !== "")' in SCRIPT
