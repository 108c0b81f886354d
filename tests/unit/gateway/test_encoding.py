"""Tokens with a bound: exactly those of the whole text, or given up soon."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.gateway.intake import encoding
from afd.gateway.intake.encoding import PIECE_CHARS, TooManyTokensError, TooSlowError, encode_bounded
from afd.gateway.tokenizer import TextTokenizer
from tests.fakes.text_model import byte_tokenizer

TOKENIZER = TextTokenizer(byte_tokenizer())


class Counting:
    """Counts the characters that were tokenised."""

    def __init__(self):
        self.num_chars = 0

    def encode(self, text, *, add_special_tokens=True):
        self.num_chars += len(text)
        return TOKENIZER.encode(text, add_special_tokens=add_special_tokens)


@settings(max_examples=25, deadline=None)
@given(st.text(alphabet="helo w\n的🌊", max_size=60), st.integers(1, 3))
def test_never_another_answer_than_the_tokenizers(text, repeats):
    text = (text * 200 * repeats)[: 3 * PIECE_CHARS]
    ids = TOKENIZER.encode(text)
    assert encode_bounded(TOKENIZER, text, max(1, len(ids)), add_special_tokens=True) == ids
    if len(ids) > 1:
        with pytest.raises(TooManyTokensError):
            encode_bounded(TOKENIZER, text, len(ids) - 1, add_special_tokens=True)


@pytest.mark.parametrize("text", ["的" * 2_600_000, "hello w" * 400_000, "🌊" * 500_000])
def test_work_is_bounded_by_the_bound_and_not_by_the_text(text):
    counting = Counting()
    with pytest.raises(TooManyTokensError, match="more than"):
        encode_bounded(counting, text, 20_000, add_special_tokens=True)
    assert counting.num_chars <= 7 * 20_000 + 2 * PIECE_CHARS


def test_a_text_that_takes_too_long_is_given_up(monkeypatch):
    """Few tokens, but so many characters: blanks, for instance."""
    monkeypatch.setattr(encoding, "PATIENCE_S", 0.0)
    with pytest.raises(TooSlowError):
        encode_bounded(TOKENIZER, "hello" * PIECE_CHARS, 5 * PIECE_CHARS - 1, add_special_tokens=True)
