"""Text to token ids with a bound: a text that is too long is given up soon after its tokens pass the bound."""

from __future__ import annotations

import time
from typing import Protocol

PIECE_CHARS = 8_192
_CUT_TOKENS = 8  # a piece alone can have a few more tokens than within the text: a split word, a leading space
PATIENCE_S = 4.0


class Encoder(Protocol):
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...


class TooManyTokensError(Exception):
    """The text has more tokens than asked for; its message says how many at least."""


class TooSlowError(Exception):
    """The tokenizer is so slow on this text that it is given up."""


def encode_bounded(tokenizer: Encoder, text: str, max_tokens: int, *, add_special_tokens: bool) -> list[int]:
    """Encode a text that may have at most `max_tokens` ids.

    Work is bounded by `max_tokens`, not by the text: a text with more characters than that is first counted piece by
    piece until the count passes the bound. TooManyTokensError, TooSlowError.
    """
    if len(text) > max(PIECE_CHARS, max_tokens):
        _count(tokenizer, text, max_tokens)
    ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    if len(ids) > max_tokens:
        raise TooManyTokensError(f"{len(ids)} tokens")
    return ids


def _count(tokenizer: Encoder, text: str, max_tokens: int) -> None:
    give_up_at = time.monotonic() + PATIENCE_S
    num_tokens = 0
    for start in range(0, len(text), PIECE_CHARS):
        piece = text[start : start + PIECE_CHARS]
        num_tokens += max(0, len(tokenizer.encode(piece, add_special_tokens=False)) - _CUT_TOKENS)
        if num_tokens > max_tokens:
            raise TooManyTokensError(f"more than {num_tokens} tokens")
        if time.monotonic() > give_up_at:
            raise TooSlowError
