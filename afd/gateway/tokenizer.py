"""Text <-> token ids, and the incremental way back: pieces of text that never end inside a character.

Two detokenisers with one contract: byte-level vocabularies (GPT-2 style) map each token to bytes and decode UTF-8
incrementally, exact and cheap; every other decoder goes through the tokenizer over a short window of tokens.
Thread rule: encode and decode may run in any thread; a detokeniser belongs to its request.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

import tokenizers
from tokenizers import decoders

REPLACEMENT = "\ufffd"
_ID_LIMIT = 1 << 32  # of the tokenizer library's integers
_WINDOW_SEED_TOKENS = 6  # prompt tokens that give the first output token its context (a leading space, mostly)
_MAX_UNDECIDED_TOKENS = 16  # a run of invalid bytes is shown as it is after so many tokens


class Detokenizer(Protocol):
    """One output's token ids in, text out."""

    def push(self, ids: Sequence[int]) -> str:
        """Text that these tokens complete; an unfinished character stays inside."""
        ...

    def flush(self) -> str:
        """The output ends: an unfinished character becomes U+FFFD."""
        ...


class TextTokenizer:
    """A `tokenizers.Tokenizer` with what serving needs beside encode and decode."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        self._byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self._shown_bytes: dict[int, bytes] = {}
        self.max_token_chars = max((len(token) for token in tokenizer.get_vocab()), default=1)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Text -> ids. Special tokens written in the text are recognised (a chat template writes them)."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Ids -> text, all at once; the oracle of the detokenisers. Unknown ids count as nothing."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(self, prompt_ids: Sequence[int] = ()) -> Detokenizer:
        """A fresh detokeniser for the output that follows `prompt_ids`."""
        if self._byte_level:
            return ByteDetokenizer(self)
        return WindowDetokenizer(self, prompt_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; special tokens by name, unknown ids as nothing."""
        token = self._tokenizer.id_to_token(token_id) if 0 <= token_id < _ID_LIMIT else None
        if token is None:
            return b""
        if self._byte_level:
            return _byte_level_bytes(token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace("\u2581", " ").encode()

    def shown_bytes(self, token_id: int) -> bytes:
        """As `token_bytes`, but nothing for special tokens: what the token adds to an output's text."""
        shown = self._shown_bytes.get(token_id)
        if shown is None:
            shown = b"" if token_id in self._special_ids else self.token_bytes(token_id)
            self._shown_bytes[token_id] = shown
        return shown

    def token_text(self, token_id: int) -> str:
        """A token alone as text; bytes that are no whole character become U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")


class ByteDetokenizer:
    """For byte-level vocabularies: bytes of each token through an incremental UTF-8 decoder."""

    def __init__(self, tokenizer: TextTokenizer):
        self._shown_bytes = tokenizer.shown_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Sequence[int]) -> str:
        shown_bytes = self._shown_bytes
        return self._decoder.decode(b"".join([shown_bytes(token_id) for token_id in ids]))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For every other decoder: decode a short window with and without the new tokens; the difference is the text."""

    def __init__(self, tokenizer: TextTokenizer, prompt_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-_WINDOW_SEED_TOKENS:])
        self._num_read = len(self._ids)  # tokens of the window whose text is out

    def push(self, ids: Sequence[int]) -> str:
        pieces = []
        for token_id in ids:
            self._ids.append(token_id)
            pieces.append(self._advance(final=len(self._ids) - self._num_read >= _MAX_UNDECIDED_TOKENS))
        return "".join(pieces)

    def flush(self) -> str:
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        shown = self._tokenizer.decode(self._ids[: self._num_read])
        text = self._tokenizer.decode(self._ids)
        if len(text) <= len(shown) or (text.endswith(REPLACEMENT) and not final):
            return ""
        # The window moves on: the tokens just shown are the context of the next ones.
        self._ids = self._ids[self._num_read :]
        self._num_read = len(self._ids)
        return text[len(shown) :]


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: character -> byte. Printable Latin-1 bytes stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), 256)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return alphabet


_ALPHABET = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    """A byte-level token's bytes; a token with a character outside the alphabet (an added one) is plain text."""
    try:
        return bytes([_ALPHABET[char] for char in token])
    except KeyError:
        return token.encode()
