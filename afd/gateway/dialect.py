"""What both response formats share: the contract, usage, accumulated choices, token texts of log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from afd.gateway.sequence import ClientSequence, Delta
from afd.types import FinishReason

MIN_LOGPROB = -9999.0  # JSON has no -inf

json = msgspec.json.encode


@dataclass(slots=True)
class Choice:
    """A complete choice, for answers that are not streamed."""

    index: int
    texts: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    _logprobs: dict[str, list[bytes]] = field(default_factory=dict)
    finish: FinishReason | None = None
    stop_reason: str | int | None = None

    def add(self, delta: Delta, logprobs: dict[str, list[Any]] | None) -> None:
        """logprobs: of the delta's tokens, as lists by name. Encoded at once: at the end it would hold up everybody."""
        self.texts.append(delta.text)
        self.ids += delta.ids
        for name, values in (logprobs or {}).items():
            self._logprobs.setdefault(name, []).append(json(values)[1:-1])
        self.finish, self.stop_reason = delta.finish, delta.stop_reason

    def logprobs(self) -> dict[str, msgspec.Raw]:
        """The lists by name."""
        lists = {name: b",".join([piece for piece in pieces if piece]) for name, pieces in self._logprobs.items()}
        return {name: msgspec.Raw(b"[" + values + b"]") for name, values in lists.items()}

    @property
    def text(self) -> str:
        return "".join(self.texts)


class ResponseFormat(Protocol):
    """JSON of one request's answer. `chunk` and `usage_chunk` give whole SSE events (bytes with the blank line)."""

    def chunk(self, delta: Delta, usage: dict[str, Any] | None) -> bytes:
        """A delta as an event; b"" when there is nothing in it for the client.

        usage: of the moment, if wanted.
        """
        ...

    def logprobs(self, delta: Delta) -> dict[str, list[Any]] | None:
        """Log-probabilities of a delta's tokens as lists by name; None when they were not asked for."""
        ...

    def usage_chunk(self, usage: dict[str, Any]) -> bytes: ...

    def body(self, choices: list[Choice], usage: dict[str, Any]) -> bytes: ...


def usage_of(sequences: list[ClientSequence], num_choices: int) -> dict[str, Any]:
    """OpenAI's usage: each prompt counts once, whatever its number of choices."""
    first_choices = sequences[::num_choices]
    prompt_tokens = sum(len(sequence.prompt_ids) for sequence in first_choices)
    completion_tokens = sum(len(sequence.output_ids) for sequence in sequences)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(sequence.cached_tokens for sequence in first_choices)},
    }


def clamp_logprob(value: float) -> float:
    """Finite, as JSON needs it."""
    return value if value > MIN_LOGPROB else MIN_LOGPROB
