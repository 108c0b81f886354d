"""What `afd up` says while a cluster starts, and once it answers. Pure text."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from afd.cluster.console import fit, width
from afd.config import ClusterConfig


@dataclass(slots=True)
class ChildProgress:
    """What one child has said of itself so far."""

    loading: float | None = None
    ready: bool = False

    def update(self, news: Mapping[str, object]) -> bool:
        """Take a news line in; True when the progress line changes."""
        before = (self.loading, self.ready)
        loading = news.get("loading")
        if isinstance(loading, int | float):
            self.loading = float(loading)
        if "ready" in news:
            self.ready = bool(news["ready"])
        return (self.loading, self.ready) != before

    def __str__(self) -> str:
        if self.loading is None:
            return "starting"
        return "loaded" if self.loading >= 1.0 else f"{self.loading:.0%}"


def progress_line(model: str, children: Mapping[str, ChildProgress], elapsed_s: float, columns: int) -> str:
    """One line of at most so many columns: how many processes are ready, and what the others are doing."""
    num_ready = sum(child.ready for child in children.values())
    head, tail = f"{num_ready} of {len(children)} ready", f"  ({elapsed_s:.1f} s)"
    busy = [f"{name} {child}" for name, child in children.items() if not child.ready]
    line = "  ".join([f"loading {model}: {head}", *busy]) + tail
    for num_shown in range(len(busy), 0, -1):
        if width(line) <= columns:
            break
        hidden = [f"and {len(busy) - num_shown} more"] if num_shown < len(busy) else []
        line = "  ".join([f"loading: {head}", *busy[:num_shown], *hidden]) + tail
    return fit(line, columns)


def ready_text(config: ClusterConfig, url: str, *, has_tokenizer: bool) -> str:
    """URL, topology and a curl line that works."""
    transport = "" if config.topology.mono else f", transport {config.cluster.transport}"
    return (
        f"AFD is ready: {url}\n"
        f"  {config.model.served_name} ({config.model.dtype}) on {config.topology}{transport}\n"
        f"  {curl_line(config, url, has_tokenizer=has_tokenizer)}\n"
        f"Ctrl-C drains and stops."
    )


def curl_line(config: ClusterConfig, url: str, *, has_tokenizer: bool) -> str:
    """A first request, with the first key of the file if there is one; a model without tokenizer takes token ids."""
    body: dict[str, object] = {"model": config.model.served_name}
    if has_tokenizer:
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": "What is the capital of France?"}]
    else:
        path = "/v1/completions"
        body |= {"prompt": [1, 2, 3], "max_tokens": 16, "return_token_ids": True}
    headers = "-H 'Content-Type: application/json'"
    if keys := config.gateway.api_keys_file:
        first_key = f"$(grep -m1 '^[^# ]' {shlex.quote(os.path.abspath(keys))})"
        headers += f' -H "Authorization: Bearer {first_key}"'
    return f"curl {url}{path} {headers} -d {shlex.quote(json.dumps(body))}"
