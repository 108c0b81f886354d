"""A model's tokenizer and chat template, from GGUF metadata or from the files beside config.json. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence
from tokenizers.processors import TemplateProcessing

from afd.errors import ModelError
from afd.model.loading import ModelFolder
from afd.model.weights.gguf import GgufSource

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """chat_template: Jinja source; None = the model has none.  bos_token, eos_token: as text, for the template."""

    tokenizer: Tokenizer
    chat_template: str | None
    bos_token: str | None
    eos_token: str | None


def load_tokenizer(folder: ModelFolder) -> TokenizerFiles | None:
    """None when the model comes without a tokenizer (it serves token ids); ModelError when the files are broken."""
    path = folder.tokenizer_path
    if path is None:
        return None
    source = folder.checkpoint.source
    if isinstance(source, GgufSource):
        return _from_gguf(source.metadata, path)
    return _from_hf_folder(path)


def _from_gguf(metadata: Mapping[str, Any], path: Path) -> TokenizerFiles:
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise ModelError(
            f"{path}: tokenizer {model!r} with pre-tokenizer {pre!r} is not supported "
            f"(known: gpt2 with {', '.join(_PRE_TOKENIZERS)})"
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [str(merge).partition(" ") for merge in metadata.get("tokenizer.ggml.merges", ())]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, [(left, right) for left, _, right in merges]))
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = ByteLevelDecoder()
    kinds = metadata.get("tokenizer.ggml.token_type", ())
    for kind, add in ((_CONTROL, tokenizer.add_special_tokens), (_USER_DEFINED, tokenizer.add_tokens)):
        added = [token for token, k in zip(tokens, kinds, strict=False) if k == kind]
        add([AddedToken(token, special=kind == _CONTROL, normalized=False) for token in added])
    bos, eos = (_token(tokens, metadata.get(f"tokenizer.ggml.{name}_token_id")) for name in ("bos", "eos"))
    if metadata.get("tokenizer.ggml.add_bos_token") and bos is not None:
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, metadata["tokenizer.ggml.bos_token_id"])]
        )
    return TokenizerFiles(tokenizer, metadata.get("tokenizer.chat_template"), bos, eos)


def _smollm() -> PreTokenizer:
    """Every digit alone, then GPT-2's split into words."""
    return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)])


def _gpt2() -> PreTokenizer:
    return ByteLevel(add_prefix_space=False, use_regex=True)


_PRE_TOKENIZERS = {"smollm": _smollm, "gpt-2": _gpt2}


def _token(tokens: list[str], token_id: int | None) -> str | None:
    return tokens[token_id] if token_id is not None and token_id < len(tokens) else None


def _from_hf_folder(path: Path) -> TokenizerFiles:
    """tokenizer.json, with tokenizer_config.json and chat_template.jinja beside it where they exist."""
    try:
        tokenizer = Tokenizer.from_str(path.read_text("utf-8"))
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise ModelError(f"{path}: not a tokenizer: {error}") from error
    config_path = path.with_name("tokenizer_config.json")
    config: dict[str, Any] = {}
    if config_path.exists():
        try:
            config = json.loads(config_path.read_bytes())
        except ValueError as error:
            raise ModelError(f"{config_path}: not JSON: {error}") from error
    template_path = path.with_name("chat_template.jinja")
    template = template_path.read_text("utf-8") if template_path.exists() else _template(config)
    return TokenizerFiles(tokenizer, template, _text(config.get("bos_token")), _text(config.get("eos_token")))


def _template(config: Mapping[str, Any]) -> str | None:
    """A string, or a list of named templates of which "default" is meant."""
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _text(token: object) -> str | None:
    """Special tokens are strings, or objects with `content`."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None
