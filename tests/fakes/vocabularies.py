"""Vocabularies of the three kinds that models come with, small enough to be cut anywhere: byte-level, byte-fallback
(Llama 2 style BPE) and SentencePiece's unigrams. None of them has a token for most characters of `CHARS`."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteFallback, Fuse, Metaspace, Replace, Strip
from tokenizers.decoders import Sequence as DecoderSequence
from tokenizers.models import BPE, Unigram
from tokenizers.normalizers import Prepend
from tokenizers.normalizers import Replace as NormalizerReplace
from tokenizers.normalizers import Sequence as NormalizerSequence
from tokenizers.pre_tokenizers import Metaspace as MetaspacePreTokenizer

from afd.gateway.tokenizer import TextTokenizer
from tests.fakes.text_model import byte_tokenizer

CHARS = "abhello wörld é日本👍🌊\u0301\u200d\n\ufffd."
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _with_specials(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.add_tokens([AddedToken("<né>", special=False, normalized=False)])
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = byte_tokenizer()
    return _with_specials(tokenizer)


def byte_fallback() -> Tokenizer:
    """Spaces are ▁, one is put before the text, and taken off again by the decoder."""
    letters = ["▁", *"abhelowrd", "é"]
    merges = [("▁", "h"), ("▁h", "e"), ("l", "l"), ("▁", "w")]
    tokens = ["<unk>", *_BYTES, *letters, *(left + right for left, right in merges)]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = NormalizerSequence([Prepend("▁"), NormalizerReplace(" ", "▁")])
    tokenizer.decoder = DecoderSequence([Replace("▁", " "), ByteFallback(), Fuse(), Strip(" ", 1, 0)])
    return _with_specials(tokenizer)


def unigrams() -> Tokenizer:
    """SentencePiece's unigram model with byte fallback."""
    pieces = ["▁", *"abhelowrd", "é", "▁hello", "▁w", "日本", "ll", "."]
    scored = [("<unk>", 0.0), *((byte, -20.0) for byte in _BYTES), *((p, -2.0 - len(p) / 10) for p in pieces)]
    tokenizer = Tokenizer(Unigram(scored, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = MetaspacePreTokenizer()
    tokenizer.decoder = DecoderSequence([ByteFallback(), Metaspace(), Fuse()])
    return _with_specials(tokenizer)


# The library's own object is the oracle of ours.
LIBRARY = {"byte level": byte_level(), "byte fallback": byte_fallback(), "unigrams": unigrams()}
OURS = {kind: TextTokenizer(tokenizer) for kind, tokenizer in LIBRARY.items()}
