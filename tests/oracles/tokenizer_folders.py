"""Small tokenizer folders of every kind that Hugging Face models come in, and what training and time leave in them.

A folder is made of a base (what the tokenizer is) and a variation (what was done to it), a function that edits files
as Python values before they are written.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece

Files = dict[str, Any]
"""File name -> JSON value, or text for .jinja files."""

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:!?<>|/_-'é日 "
WORDS = ["hello", "hell", "he", "ll", "world", "wor", "ld", "the", "he", "in", "an"]
TEXTS = [
    "hello world",
    "  two  spaces and\na line\n\n",
    "",
    " ",
    "日本語 é 🌊 e\u0301 ﬁ Å",
    "Hello WORLD 1234567 it's",
    "<s>hello</s><|im_start|>user\nhello<|im_end|> <extra> <Extra>x <tool>",
    "a<extra>b  <extra>  c<extra><extra>",
    "<|new|>hello <|new|> hello<unk>",
    "word newword newwords Newword",
    "x" * 200,
]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


# --- bases ------------------------------------------------------------------------------------------------


def byte_level() -> Tokenizer:
    """GPT-2's kind."""
    tokenizer = _byte_bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _with_special(tokenizer)


def byte_level_split() -> Tokenizer:
    """Llama 3's and Qwen's kind: a pattern of its own, digits apart, NFC."""
    tokenizer = _byte_bpe(ignore_merges=True)
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return _with_special(tokenizer)


def qwen_like() -> Tokenizer:
    """Qwen's own pattern."""
    tokenizer = _byte_bpe()
    tokenizer.normalizer = normalizers.NFC()
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    split = pre_tokenizers.Split(Regex(pattern + r"|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return _with_special(tokenizer)


def byte_fallback() -> Tokenizer:
    """Llama 2's kind: spaces as a normaliser has them, bytes for what is unknown."""
    tokenizer = Tokenizer(_spaced_bpe())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = _spaced_decoder()
    return _with_special(tokenizer)


def metaspace() -> Tokenizer:
    """The newer spelling of the same kind."""
    tokenizer = Tokenizer(_spaced_bpe())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = _spaced_decoder()
    return _with_special(tokenizer)


def unigram() -> Tokenizer:
    """T5's kind."""
    pieces = [(token, 0.0) for token in SPECIAL[:3]]
    pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    pieces += [("▁", -2.0)] + [(letter, -5.0) for letter in LETTERS.strip()]
    pieces += [(f"▁{word}", -3.0 - i / 10) for i, word in enumerate(dict.fromkeys(WORDS))]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = _spaced_decoder()
    return _with_special(tokenizer)


def word_piece() -> Tokenizer:
    """BERT's kind."""
    letters = list(LETTERS.lower().strip())
    tokens = dict.fromkeys([*SPECIAL[:3], *letters, *(f"##{letter}" for letter in letters), *WORDS])
    tokenizer = Tokenizer(WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _with_special(tokenizer)


def word_level() -> Tokenizer:
    """One token a word, lower case."""
    tokens = dict.fromkeys([*SPECIAL[:3], *WORDS, "user", "word", "two", "spaces", "and", "a", "b", "c"])
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _with_special(tokenizer)


BASES: dict[str, Callable[[], Tokenizer]] = {
    make.__name__: make
    for make in (byte_level, byte_level_split, byte_fallback, metaspace, unigram, word_piece, word_level)
}


def _byte_bpe(*, ignore_merges: bool = False) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ġw", "o"), ("1", "2")]
    tokens = ["<unk>", "<s>", "</s>", *alphabet, *(left + right for left, right in merges)]
    model = BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=ignore_merges)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _spaced_bpe() -> BPE:
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "hello"), ("▁", "w")]
    tokens = SPECIAL[:3] + [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *LETTERS.strip()]
    tokens += [left + right for left, right in merges]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def _spaced_decoder() -> decoders.Decoder:
    return decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


def _with_special(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


# --- variations -------------------------------------------------------------------------------------------


def plain(files: Files) -> None:
    """Only tokenizer.json."""


def truncated(files: Files) -> None:
    """What training with a maximum length leaves."""
    files["tokenizer.json"]["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip


def padded(files: Files) -> None:
    files["tokenizer.json"]["padding"] = _padding({"Fixed": 64})


def padded_to_multiples(files: Files) -> None:
    files["tokenizer.json"]["padding"] = {**_padding("BatchLongest"), "direction": "Left", "pad_to_multiple_of": 8}
    files["tokenizer.json"]["truncation"] = {
        "direction": "Left", "max_length": 6, "strategy": "OnlyFirst", "stride": 1
    }  # fmt: skip
    files["tokenizer_config.json"] = {"model_max_length": 4, "padding_side": "left", "truncation_side": "left"}


def listed_in_the_config(files: Files) -> None:
    """added_tokens_decoder: new tokens, known ones, and flags that change one."""
    files["tokenizer_config.json"] = {
        "eos_token": "<|im_end|>",
        "bos_token": "<s>",
        "added_tokens_decoder": {
            "3": _token("<|im_start|>", special=True),
            "900": _token("<extra>", lstrip=True, rstrip=True),
            "901": _token("<|new|>", special=True),
            "902": _token("newword", single_word=True, normalized=True),
            "4": _token("<|im_end|>", special=True, lstrip=True),
        },
    }


def older_files(files: Files) -> None:
    """added_tokens.json and special_tokens_map.json."""
    files["added_tokens.json"] = {"<extra>": 900, "<|new|>": 901, "newword": 902}
    files["special_tokens_map.json"] = {
        "bos_token": {"content": "<s>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False},
        "eos_token": "</s>",
        "additional_special_tokens": ["<|new|>"],
    }
    files["tokenizer_config.json"] = {"bos_token": "<|im_start|>", "unk_token": "<unk>"}


def only_a_special_tokens_map(files: Files) -> None:
    files["special_tokens_map.json"] = {"eos_token": "<|new|>", "pad_token": "<extra>"}


def only_added_tokens(files: Files) -> None:
    files["added_tokens.json"] = {"newword": 900, "<Extra>": 901}


def special_by_text(files: Files) -> None:
    """Special tokens that no list of added tokens has: they are added, some of them from the vocabulary."""
    files["tokenizer_config.json"] = {
        "bos_token": "<|new|>", "eos_token": {"__type": "AddedToken", **_token("<extra>", rstrip=True)},
        "unk_token": "<unk>", "pad_token": "a", "mask_token": None,
    }  # fmt: skip


def listed_without_names(files: Files) -> None:
    files["tokenizer_config.json"] = {"extra_special_tokens": ["<extra>", "<|new|>"], "eos_token": "</s>"}


def listed_under_the_old_key(files: Files) -> None:
    files["tokenizer_config.json"] = {"additional_special_tokens": ["<extra>", "<s>"], "pad_token": "</s>"}


def names_of_its_own(files: Files) -> None:
    """What a model with images or tools has."""
    files["tokenizer_config.json"] = {
        "image_token": "<extra>", "eos_token": "</s>", "tool_token": "<tool>",
        "extra_special_tokens": {"boi_token": "<|new|>"},
    }  # fmt: skip


def with_bos_and_eos(files: Files) -> None:
    """A post-processor; the flags beside it count for nothing."""
    files["tokenizer.json"]["post_processor"] = _template_processing("<s> $A </s>")
    files["tokenizer_config.json"] = {"add_bos_token": False, "add_eos_token": False, "bos_token": "<s>"}


def with_flags_alone(files: Files) -> None:
    files["tokenizer_config.json"] = {
        "add_bos_token": True, "add_eos_token": True, "bos_token": "<s>", "eos_token": "</s>",
        "add_prefix_space": True, "legacy": False, "clean_up_tokenization_spaces": False,
    }  # fmt: skip


def split_special(files: Files) -> None:
    files["tokenizer_config.json"] = {"split_special_tokens": True, "eos_token": "</s>"}


def lower_case(files: Files) -> None:
    """A normaliser that added tokens do, or do not, go through."""
    own = files["tokenizer.json"]["normalizer"]
    files["tokenizer.json"]["normalizer"] = {
        "type": "Sequence", "normalizers": [{"type": "Lowercase"}, *([own] if own else [])]
    }  # fmt: skip
    files["tokenizer_config.json"] = {
        "added_tokens_decoder": {
            "900": _token("<Extra>", normalized=True),
            "901": _token("Newword", normalized=False),
        }
    }


VARIATIONS: dict[str, Callable[[Files], None]] = {
    edit.__name__: edit
    for edit in (
        plain, truncated, padded, padded_to_multiples, listed_in_the_config, older_files, only_a_special_tokens_map,
        only_added_tokens, special_by_text, listed_without_names, listed_under_the_old_key, names_of_its_own,
        with_bos_and_eos, with_flags_alone, split_special, lower_case,
    )
}  # fmt: skip


def write_folder(folder: Path, files: Files) -> Path:
    """The folder with its files."""
    for name, value in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value if name.endswith(".jinja") else json.dumps(value), encoding="utf-8")
    return folder


def files_of(base: str, variation: str) -> Files:
    """A base's files after a variation."""
    files: Files = {"tokenizer.json": json.loads(BASES[base]().to_str())}
    VARIATIONS[variation](files)
    return files


def _token(content: str, **flags: bool) -> dict[str, Any]:
    usual = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": False}
    return {"content": content, **usual, **flags}


def _padding(strategy: object) -> dict[str, Any]:
    return {
        "strategy": strategy, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<unk>",
    }  # fmt: skip


def _template_processing(single: str) -> dict[str, Any]:
    made = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    state: dict[str, Any] = json.loads(made.__getstate__())
    return state
