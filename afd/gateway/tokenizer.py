"""Text <-> token ids, and the incremental way back: pieces of text that never end inside a character.

Two detokenisers with one contract: byte-level vocabularies (GPT-2 style) map each token to bytes and decode UTF-8
incrementally, exact and cheap; every other decoder goes through the tokenizer over a short window of tokens, with the
byte tokens of SentencePiece vocabularies (<0xNN>) put together here.
The seam: a prompt of token ids may end inside a character. That character belongs to the output, whole: the prompt's
text (`TextTokenizer.prompt_text`) ends before it.
Thread rule: encode and decode may run in any thread; a detokeniser belongs to its request.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import tokenizers
from tokenizers import decoders

REPLACEMENT = "\ufffd"
_ID_LIMIT = 1 << 32  # of the tokenizer library's integers
_CONTEXT_TOKENS = 6  # earlier tokens that the text of the next one depends on (a leading space, mostly)
_MAX_UNDECIDED_TOKENS = 16  # a run of invalid bytes is shown as it is after so many tokens
_MAX_PARTIAL_BYTES = 3  # of a UTF-8 character
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Piece(NamedTuple):
    """What one token adds to a text.

    text: what it completes; an unfinished character is none of it.
    num_before: characters at the beginning of `text` that earlier tokens began and did not finish (bytes that
    are no character), so that the token's own text comes after them.
    """

    text: str
    num_before: int


class Detokenizer(Protocol):
    """One output's token ids in, text out."""

    def push(self, ids: Sequence[int]) -> str:
        """Text that these tokens complete; an unfinished character stays inside."""
        ...

    def push_one(self, token_id: int) -> Piece:
        """Take one token as `push` does, and tell its text with the place of the token in the text."""
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
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self._shown_bytes: dict[int, bytes] = {}
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        self.max_token_chars = max((len(token) for token in vocabulary), default=1)
        self._byte_tokens = _byte_tokens(vocabulary) if _falls_back_to_bytes(tokenizer) else {}

    @classmethod
    def from_json(cls, text: str, *, splits_special: bool = False) -> TextTokenizer:
        """What `to_json` and `splits_special` gave."""
        tokenizer = tokenizers.Tokenizer.from_str(text)
        tokenizer.encode_special_tokens = splits_special
        return cls(tokenizer)

    @property
    def splits_special(self) -> bool:
        """Special tokens written in a text are ordinary text. The library keeps that out of its JSON."""
        return bool(self._tokenizer.encode_special_tokens)

    def to_json(self) -> str:
        """The whole tokenizer as text, for another process."""
        text: str = self._tokenizer.to_str()
        return text

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Text -> ids. Special tokens in it are recognised (a template writes them), unless `splits_special`."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Ids -> text, all at once. Unknown ids count as nothing."""
        if self._byte_level:
            bytes_of = self.shown_bytes if skip_special_tokens else self.token_bytes
            return b"".join([bytes_of(token_id) for token_id in ids]).decode(errors="replace")
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def prompt_text(self, ids: Sequence[int]) -> str:
        """A prompt's text, special tokens by name, up to the character that it ends inside (the output's first)."""
        if self._byte_level:
            data = b"".join([self.token_bytes(token_id) for token_id in ids])
            return data[: len(data) - len(self.partial_bytes(ids))].decode(errors="replace")
        return self.decode(ids[: len(ids) - len(self.partial_bytes(ids))], skip_special_tokens=False)

    def partial_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of the character that a prompt ends inside; b"" where it ends on a character."""
        tail = b""
        for token_id in reversed(ids):
            ends = token_id in self._special_ids
            data = b"" if ends else self.partial_token_bytes(token_id)
            if data is None:
                break
            tail = data + tail
            if ends or len(tail) >= _MAX_PARTIAL_BYTES:
                break
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        decoder.decode(tail[-_MAX_PARTIAL_BYTES:])
        return decoder.getstate()[0]

    def partial_token_bytes(self, token_id: int) -> bytes | None:
        """A token's bytes if they may be a part of a character, None if the token is text of its own."""
        if self._byte_level:
            return self.token_bytes(token_id)
        return self._byte_tokens.get(token_id)

    def detokenizer(self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True) -> Detokenizer:
        """A fresh detokeniser for the output that follows `prompt_ids`."""
        if self._byte_level:
            return ByteDetokenizer(self, prompt_ids, skip_special_tokens=skip_special_tokens)
        return WindowDetokenizer(self, prompt_ids, skip_special_tokens=skip_special_tokens)

    @property
    def has_byte_tokens(self) -> bool:
        """Whether characters outside the vocabulary are spelled in byte tokens (<0xNN>)."""
        return bool(self._byte_tokens)

    def is_shown(self, token_id: int, *, skip_special_tokens: bool = True) -> bool:
        """Whether the token can add text: it is known, and not a special one unless those are wanted."""
        if token_id in self._special_ids:
            return not skip_special_tokens
        return 0 <= token_id < _ID_LIMIT and self._tokenizer.id_to_token(token_id) is not None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; special tokens by name, unknown ids as nothing."""
        added = self._added.get(token_id)
        if added is not None:
            return added.encode()
        token = self._tokenizer.id_to_token(token_id) if 0 <= token_id < _ID_LIMIT else None
        if token is None:
            return b""
        if self._byte_level:
            return _byte_level_bytes(token)
        byte = self._byte_tokens.get(token_id)
        return byte if byte is not None else token.replace("\u2581", " ").encode()

    def shown_bytes(self, token_id: int) -> bytes:
        """What the token adds to an output's text: its `token_bytes`, and nothing for special tokens."""
        shown = self._shown_bytes.get(token_id)
        if shown is None:
            shown = b"" if token_id in self._special_ids else self.token_bytes(token_id)
            self._shown_bytes[token_id] = shown
        return shown

    def token_text(self, token_id: int) -> str:
        """A token alone as text; bytes that are no whole character become U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")


class ByteDetokenizer:
    """Detokenizer of byte-level vocabularies: bytes of each token go through an incremental UTF-8 decoder."""

    def __init__(self, tokenizer: TextTokenizer, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True):
        self._bytes_of = tokenizer.shown_bytes if skip_special_tokens else tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._decoder.decode(tokenizer.partial_bytes(prompt_ids))

    def push(self, ids: Sequence[int]) -> str:
        bytes_of = self._bytes_of
        return self._decoder.decode(b"".join([bytes_of(token_id) for token_id in ids]))

    def push_one(self, token_id: int) -> Piece:
        data, decoder = self._bytes_of(token_id), self._decoder
        if not decoder.getstate()[0]:
            return Piece(decoder.decode(data), 0)
        # The first byte either goes on with the unfinished character or shows that there is none.
        first = decoder.decode(data[:1])
        in_vain = len(first) > 1 or (len(first) == 1 and decoder.getstate()[0] != b"")
        return Piece(first + decoder.decode(data[1:]), int(in_vain))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """Detokenizer of every other vocabulary: the text of a short window with the new token, less that without it.

    Byte tokens are put together apart from that: the library makes U+FFFD of a whole run of them for one bad byte.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._context = self._last_shown(prompt_ids)
        self._partial = tokenizer.partial_bytes(prompt_ids)
        self._undecided: list[int] = []  # tokens whose text may still change

    def push(self, ids: Sequence[int]) -> str:
        return "".join([self.push_one(token_id).text for token_id in ids])

    def push_one(self, token_id: int) -> Piece:
        if not self._tokenizer.is_shown(token_id, skip_special_tokens=self._skip_special):
            return Piece("", 0)
        byte = self._tokenizer.partial_token_bytes(token_id)
        if byte is not None:
            return self._push_byte(token_id, byte)
        broken = self._take_partial()
        self._undecided.append(token_id)
        return Piece(broken + self._decide(final=len(self._undecided) >= _MAX_UNDECIDED_TOKENS), len(broken))

    def flush(self) -> str:
        return self._decide(final=True) + self._take_partial()

    def _last_shown(self, prompt_ids: Sequence[int]) -> list[int]:
        shown: list[int] = []
        for token_id in reversed(prompt_ids):
            if self._tokenizer.is_shown(token_id, skip_special_tokens=self._skip_special):
                shown.append(token_id)
                if len(shown) == _CONTEXT_TOKENS:
                    break
        return shown[::-1]

    def _push_byte(self, token_id: int, byte: bytes) -> Piece:
        """A byte goes on with the unfinished character, or that one becomes U+FFFD for each of its bytes."""
        decided = self._decide(final=True)
        is_first = not self._context
        self._remember([token_id])
        data = self._partial + byte
        broken = ""
        while True:
            try:
                text, self._partial = data.decode(), b""
                break
            except UnicodeDecodeError as error:
                if error.end == len(data) and "end of data" in error.reason:
                    text, self._partial = "", data
                    break
                if len(data) == 1:
                    text, self._partial = REPLACEMENT, b""
                    break
                broken, data = REPLACEMENT * (len(data) - 1), byte
        if is_first and text:
            text = self._decode([token_id])  # a decoder may take the space off that a text begins with
        return Piece(decided + broken + text, len(decided) + len(broken))

    def _take_partial(self) -> str:
        broken, self._partial = REPLACEMENT * len(self._partial), b""
        return broken

    def _decide(self, *, final: bool) -> str:
        """Text of the undecided tokens; "" while a later one may change it."""
        if not self._undecided:
            return ""
        shown = self._decode(self._context)
        text = self._decode(self._context + self._undecided)
        if not final and text.endswith(REPLACEMENT) and not self._tokenizer.has_byte_tokens:
            return ""
        self._remember(self._undecided)
        self._undecided = []
        return text[_num_common(shown, text) :]

    def _remember(self, ids: list[int]) -> None:
        self._context = (self._context + ids)[-_CONTEXT_TOKENS:]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special)


class TextOffsets:
    """Where each token's text begins in the text of an output, in characters.

    All tokens of one character have its place; a token without text has the place of the text that comes next.
    """

    def __init__(self, detokenizer: Detokenizer):
        """detokenizer: a fresh one of the output."""
        self._detokenizer = detokenizer
        self._num_chars = 0

    def next(self, token_id: int) -> int:
        """The place of the output's next token."""
        piece = self._detokenizer.push_one(token_id)
        offset = self._num_chars + piece.num_before
        self._num_chars += len(piece.text)
        return offset


def _num_common(shown: str, text: str) -> int:
    """Length of what both begin with: all of `shown`, unless the new tokens changed the end of it."""
    if text.startswith(shown):
        return len(shown)
    return next((i for i, (a, b) in enumerate(zip(shown, text, strict=False)) if a != b), min(len(shown), len(text)))


def _falls_back_to_bytes(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether the decoder takes <0xNN> for a byte: SentencePiece's way with what the vocabulary lacks."""
    return tokenizer.decoder is not None and tokenizer.decoder.decode(["<0x41>"]) == "A"


def _byte_tokens(vocabulary: dict[str, int]) -> dict[int, bytes]:
    """Token id -> the byte it stands for."""
    matches = ((_BYTE_TOKEN.fullmatch(token), token_id) for token, token_id in vocabulary.items())
    return {token_id: bytes.fromhex(match[1]) for match, token_id in matches if match is not None}


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
