"""What gateways were sent of each attempt, so that a lost message can be sent again. Pure."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from afd.messages.serving import TokenChunk, TokenLogprobs, Tokens
from afd.types import FinishReason

FINISHED_KEPT = 1024  # ended requests whose tokens a gateway may still ask for again


@dataclass(slots=True)
class _Record:
    """All that was sent of one attempt: ids[i] has output index first_idx + i."""

    gateway: bytes
    attempt: int
    first_idx: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: FinishReason | None = None
    error: str | None = None
    retryable: bool = False


class Ledger:
    """Records of live requests, and of the newest FINISHED_KEPT ended ones; and the chunks that are to be sent."""

    def __init__(self) -> None:
        self._records: OrderedDict[str, _Record] = OrderedDict()
        self._finished: OrderedDict[str, None] = OrderedDict()
        self._unsent: dict[bytes, list[TokenChunk]] = {}
        self._resent: set[str] = set()  # requests whose tokens are in `_unsent` once more

    def open(self, req_id: str, gateway: bytes, attempt: int, first_idx: int) -> None:
        """Start recording an attempt, whose first token will have output index `first_idx`."""
        self._finished.pop(req_id, None)
        self._records[req_id] = _Record(gateway, attempt, first_idx)

    def post(self, chunk: TokenChunk) -> None:
        """Record and queue the next tokens of an open attempt; those of any other are dropped."""
        record = self._records.get(chunk.req_id)
        if record is None or record.attempt != chunk.attempt:
            return
        record.ids.extend(chunk.ids)
        if chunk.logprobs is not None:
            record.logprobs.extend(chunk.logprobs)
        if chunk.finish is not None:
            record.finish, record.error, record.retryable = chunk.finish, chunk.error, chunk.retryable
            self._finished[chunk.req_id] = None
            while len(self._finished) > FINISHED_KEPT:
                oldest, _none = self._finished.popitem(last=False)
                self._records.pop(oldest, None)
        self._unsent.setdefault(record.gateway, []).append(chunk)

    def resend(self, req_id: str, attempt: int, from_idx: int) -> bool:
        """Queue what was sent before, from output index `from_idx` on, or from its end. False: that attempt is not on
        record.
        """
        record = self._records.get(req_id)
        if record is None or record.attempt != attempt:
            return False
        if req_id in self._resent:
            return True  # asked for twice before the first answer left
        self._resent.add(req_id)
        skip = min(max(0, from_idx - record.first_idx), len(record.ids))
        chunk = TokenChunk(
            req_id,
            attempt,
            record.first_idx + skip,
            record.ids[skip:],
            record.logprobs[skip:] or None,
            record.finish,
            record.error,
            record.retryable,
        )
        self._unsent.setdefault(record.gateway, []).append(chunk)
        return True

    def forget(self, req_id: str) -> None:
        """The request was aborted."""
        self._records.pop(req_id, None)
        self._finished.pop(req_id, None)

    def take_unsent(self) -> list[tuple[bytes, Tokens]]:
        """What is to be sent: one message for each gateway."""
        if not self._unsent:
            return []
        messages = [(gateway, Tokens(chunks)) for gateway, chunks in self._unsent.items()]
        self._unsent = {}
        self._resent.clear()
        return messages
