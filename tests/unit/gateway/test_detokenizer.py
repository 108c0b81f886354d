"""Incremental detokenising: the pieces make the whole, and no piece ends inside a character."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import ByteFallback, Fuse, Metaspace
from tokenizers.decoders import Sequence as DecoderSequence
from tokenizers.models import BPE

from afd.gateway.tokenizer import ByteDetokenizer, TextTokenizer, WindowDetokenizer
from tests.fakes.text_model import byte_tokenizer

BYTE_LEVEL = TextTokenizer(byte_tokenizer())
TEXTS = ["hello world", "naïve café", "日本語テキスト", "👩‍👩‍👧‍👦 family", "a\u0301 combining", "tab\tnew\nline"]


def byte_fallback_tokenizer():
    """Llama-2 style: ▁ for spaces, <0xNN> for what the vocabulary lacks."""
    tokens = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "▁hello", "▁world", "a", "b", "é"]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, [], byte_fallback=True))
    tokenizer.decoder = DecoderSequence([ByteFallback(), Metaspace(), Fuse()])
    return TextTokenizer(tokenizer)


FALLBACK = byte_fallback_tokenizer()


def pieces_of(detokenizer, ids, size):
    return [detokenizer.push(ids[i : i + size]) for i in range(0, len(ids), size)] + [detokenizer.flush()]


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_whole(text, size):
    ids = BYTE_LEVEL.encode(text)
    pieces = pieces_of(BYTE_LEVEL.detokenizer(), ids, size)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(ids=st.lists(st.integers(0, BYTE_LEVEL.vocab_size - 1), max_size=30), size=st.integers(1, 4))
def test_byte_level_equals_decoding_at_once_whatever_the_ids(ids, size):
    detokenizer = BYTE_LEVEL.detokenizer()
    assert isinstance(detokenizer, ByteDetokenizer)
    assert "".join(pieces_of(detokenizer, ids, size)) == BYTE_LEVEL.decode(ids)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text(st.sampled_from("abé日👍 "), max_size=12), size=st.integers(1, 4))
def test_window_equals_decoding_at_once(text, size):
    words = [w for char in text for w in ([256] if char == " " else FALLBACK.encode(char))]
    ids = [257, *words, 258]
    detokenizer = FALLBACK.detokenizer()
    assert isinstance(detokenizer, WindowDetokenizer)
    pieces = pieces_of(detokenizer, ids, size)
    assert "".join(pieces) == FALLBACK.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_window_keeps_the_space_that_follows_the_prompt():
    detokenizer = FALLBACK.detokenizer(prompt_ids=[257])
    assert detokenizer.push([258]) == " world"


def test_a_run_of_invalid_bytes_does_not_hold_the_text_for_ever():
    detokenizer = FALLBACK.detokenizer()
    shown = detokenizer.push([0xFF] * 40)
    assert len(shown) >= 16


def test_special_tokens_are_not_shown_but_have_a_name():
    end = BYTE_LEVEL.encode("<|end|>")
    assert len(end) == 1
    assert BYTE_LEVEL.detokenizer().push(end) == ""
    assert BYTE_LEVEL.token_text(end[0]) == "<|end|>"


def test_token_bytes():
    (token,) = BYTE_LEVEL.encode("hello")
    assert BYTE_LEVEL.token_bytes(token) == b"hello"
    assert b"".join(BYTE_LEVEL.token_bytes(i) for i in BYTE_LEVEL.encode("日")) == "日".encode()
    assert FALLBACK.token_bytes(0x41) == b"A"
    assert FALLBACK.token_bytes(257) == b" hello"
    assert BYTE_LEVEL.token_bytes(10**6) == b""
