"""What `afd up` says while a cluster starts, and once it answers. Pure text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

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
        if self.ready:
            return "ready"
        if self.loading is None:
            return "starting"
        return "loaded" if self.loading >= 1.0 else f"{self.loading:.0%}"


def progress_line(model: str, children: Mapping[str, ChildProgress], elapsed_s: float) -> str:
    """One line: every process with what it is doing."""
    states = "  ".join(f"{name} {state}" for name, state in children.items())
    return f"loading {model}: {states}  ({elapsed_s:.1f} s)"


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
    """A first request; a model without tokenizer takes token ids."""
    body: dict[str, object] = {"model": config.model.served_name}
    if has_tokenizer:
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": "What is the capital of France?"}]
    else:
        path = "/v1/completions"
        body |= {"prompt": [1, 2, 3], "max_tokens": 16, "return_token_ids": True}
    body["temperature"] = 0
    return f"curl {url}{path} -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
