"""A model's tokenizer and chat templates, from GGUF metadata or from the files beside config.json. No torch.

A Hugging Face folder is read as `transformers` reads it: tokenizer.json, then the tokens that the files beside it add.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteFallback, Fuse, Replace, Strip
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.decoders import Sequence as Decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Metaspace, PreTokenizer
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.processors import TemplateProcessing

from afd.errors import ModelError
from afd.model.chat_templates import templates_of_folder, templates_of_gguf
from afd.model.door import model_door
from afd.model.loading import ModelFolder
from afd.model.model_files import read_file, read_json_object
from afd.model.weights.gguf import GgufSource

log = logging.getLogger(__name__)

MAX_TOKENIZER_BYTES = 256 << 20
_LLAMA_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_NEVER_LLAMA_CLASS = ("ernie4_5_moe", "llava", "qwen2", "step3_vl")  # whatever tokenizer_class says, in transformers
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
_OTHER_KINDS = ("tokenizer.model", "tiktoken.model", "tekken.json", "vocab.json")
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_GGUF_NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "seperator": "sep_token",
               "padding": "pad_token", "cls": "cls_token", "mask": "mask_token"}  # fmt: skip
_TOKEN_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
_GGUF_END_KEYS = ("eos", "eot", "eom")
# Tokens that end a text by their names, as llama.cpp has it: converters often name only one of them.
_END_NAMES = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
))  # fmt: skip


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """chat_templates: Jinja source by name; empty = the model has none.

    special_tokens: their text by name ("bos_token"), which templates use.
    eos_token_ids: tokens that end a text by the tokenizer's files (config.json and generation_config.json may name
    more).
    """

    tokenizer: Tokenizer
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()


def load_tokenizer(folder: ModelFolder) -> TokenizerFiles | None:
    """None when the model comes without a tokenizer (it serves token ids); ModelError when the files are broken."""
    path = folder.tokenizer_path
    if path is None:
        others = [name for name in _OTHER_KINDS if folder.path is not None and (folder.path / name).is_file()]
        if others:
            log.warning(
                "%s is not read, and there is no tokenizer.json: this model serves token ids only. Convert it with "
                "transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
                " or ".join(others),
            )
        return None
    source = folder.checkpoint.source
    with model_door(str(path)):
        if isinstance(source, GgufSource):
            return read_gguf_tokenizer(source.metadata, path)
        return read_tokenizer_folder(path.parent)


# --- Hugging Face folders ---------------------------------------------------------------------------------


def read_tokenizer_folder(folder: Path) -> TokenizerFiles:
    """tokenizer.json, and beside it tokenizer_config.json, special_tokens_map.json, added_tokens.json and templates.

    ModelError, with the file's name, for what cannot be read.
    """
    path = folder / "tokenizer.json"
    data = read_file(folder, path.name, MAX_TOKENIZER_BYTES)
    if data is None:
        raise ModelError(f"{path}: missing")
    config = read_json_object(folder, "tokenizer_config.json") or {}
    try:
        tokenizer = Tokenizer.from_buffer(data)
        own = tokenizer.get_added_tokens_decoder()
        if _is_llama_class(folder, config, data):
            tokenizer = Tokenizer.from_str(_as_llama_class(json.loads(data), config))
            config = {**_LLAMA_TOKENS, **config}
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise ModelError(f"{path}: not a tokenizer: {error}") from error
    if tokenizer.padding is not None:
        config.setdefault("pad_token", tokenizer.padding["pad_token"])
    tokenizer.no_truncation()  # what training left in the file would cut or pad every prompt
    tokenizer.no_padding()
    try:
        special_tokens = _add_tokens(tokenizer, own, folder, config)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ModelError(f"{folder / 'tokenizer_config.json'}, or a file of tokens beside it: {error}") from error
    tokenizer.encode_special_tokens = config.get("split_special_tokens") is True
    eos = tokenizer.token_to_id(special_tokens["eos_token"]) if "eos_token" in special_tokens else None
    return TokenizerFiles(
        tokenizer, templates_of_folder(folder, config), special_tokens, (eos,) if eos is not None else ()
    )


def _is_llama_class(folder: Path, config: Mapping[str, Any], data: bytes) -> bool:
    """Whether transformers reads the folder as LlamaTokenizer, which has a pipeline of its own for BPE with spaces."""
    model = read_json_object(folder, "config.json") or {}
    declared = config.get("tokenizer_class") or model.get("tokenizer_class")
    return (
        isinstance(declared, str)
        and declared.removesuffix("Fast") == "LlamaTokenizer"
        and model.get("model_type") not in _NEVER_LLAMA_CLASS
        and b'"ByteLevel"' not in data
        and json.loads(data)["model"].get("type") == "BPE"
    )


def _as_llama_class(spec: dict[str, Any], config: Mapping[str, Any]) -> str:
    """tokenizer.json with the normaliser, pre-tokenizer, decoder and flags of LlamaTokenizer, and no added token."""
    prefix = config.get("add_prefix_space") is not False
    scheme = ("always" if config.get("legacy") else "first") if prefix else "never"
    decoder = [Replace("\u2581", " "), ByteFallback(), Fuse(), *([Strip(" ", 1, 0)] if prefix else [])]
    model = BPE(
        spec["model"]["vocab"],
        [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in spec["model"]["merges"]],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = Decoders(decoder)
    made = json.loads(tokenizer.to_str())
    kept = {name: spec.get(name) for name in ("post_processor", "padding")}
    return json.dumps({**made, **kept})


def _add_tokens(
    tokenizer: Tokenizer, own: Mapping[int, AddedToken], folder: Path, config: Mapping[str, Any]
) -> dict[str, str]:
    """Add the tokens that the files beside tokenizer.json name; the text of the named ones ("bos_token").

    added_tokens_decoder of tokenizer_config.json is the whole list where it is there. Without it the older files count,
    special_tokens_map.json (over tokenizer_config.json) and added_tokens.json.
    own: those of tokenizer.json.
    """
    present = tokenizer.get_added_tokens_decoder().values()
    settings = dict(config)
    listed: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in config:
        listed = {
            int(token_id): AddedToken(**_known(fields)) for token_id, fields in config["added_tokens_decoder"].items()
        }
    else:
        older = read_json_object(folder, "special_tokens_map.json") or {}
        settings |= older
        last = settings.pop("additional_special_tokens", None)  # counts only where nothing else is listed, and not here
        settings["extra_special_tokens"] = _merged(_listed(config), older.get("extra_special_tokens") or ())
        special = {_text(settings.get(name)) for name in _NAMED_TOKENS} | {_text(t) for t in _listed(settings)}
        for text, token_id in (read_json_object(folder, "added_tokens.json") or {}).items():
            listed[int(token_id)] = AddedToken(text, normalized=text not in special, special=text in special)
        listed |= own
        settings["extra_special_tokens"] = settings["extra_special_tokens"] or last
    named = {**_named_tokens(config), **_named_tokens(settings)}
    by_text = {token.content: token for token in listed.values()}
    known = {repr(token) for token in present}
    added = [token for _, token in sorted(listed.items()) if repr(token) not in known]
    texts = {token.content for token in (*present, *added)}
    for value in (*named.values(), *_listed(settings)):
        token = by_text.get(_text(value)) or _added_token(value)
        if token.content not in texts:
            texts.add(token.content)
            added.append(token)
    names = {_text(value) for value in named.values()}
    for token in added:
        token.special = token.special or token.content in names
    tokenizer.add_tokens(added)
    return {name: _text(value) for name, value in named.items()}


def _named_tokens(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens that have a name: the usual seven, then any other NAME_token, then those of an object."""
    named = {name: settings[name] for name in _NAMED_TOKENS if settings.get(name) is not None}
    named |= {name: value for name, value in settings.items() if name.endswith("_token") and isinstance(value, str)}
    extra = settings.get("extra_special_tokens")
    return {**named, **(extra if isinstance(extra, Mapping) else {})}


def _listed(settings: Mapping[str, Any]) -> Sequence[Any]:
    """The special tokens without names, under their new or old key."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or ()
    return () if isinstance(extra, Mapping) else tuple(extra)


def _merged(extra: Sequence[Any], more: Any) -> Any:
    """extra: of tokenizer_config.json.
    more: of special_tokens_map.json; an object of named tokens takes its place.
    """
    return more if isinstance(more, Mapping) else [*extra, *(token for token in more if token not in extra)]


def _text(token: Any) -> str:
    """Special tokens are texts, or objects with `content`."""
    return str(token["content"] if isinstance(token, Mapping) else token)


def _added_token(token: Any) -> AddedToken:
    if not isinstance(token, Mapping):
        return AddedToken(str(token), special=True)
    return AddedToken(**{"special": True, **_known(token)})


def _known(token: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that count; the library writes the names of others to the terminal as they are."""
    return {name: token[name] for name in _TOKEN_FIELDS if name in token}


# --- GGUF files -------------------------------------------------------------------------------------------


def read_gguf_tokenizer(metadata: Mapping[str, Any], path: Path) -> TokenizerFiles:
    """metadata: a GGUF file's.
    path: the file, for messages. ModelError for an unknown or broken vocabulary.
    """
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise ModelError(
            f"{path}: tokenizer {model!r} with pre-tokenizer {pre!r} is not supported "
            f"(known: gpt2 with {', '.join(_PRE_TOKENIZERS)})"
        )
    try:
        tokenizer = _gguf_tokenizer(metadata, _PRE_TOKENIZERS[pre]())
    except Exception as error:  # the library raises bare Exception for merges that are not in the vocabulary
        raise ModelError(f"{path}: malformed vocabulary: {error}") from error
    ids = {key: _token_id(metadata, key, path) for key in (*_GGUF_NAMED, *_GGUF_END_KEYS)}
    tokens: Sequence[str] = metadata["tokenizer.ggml.tokens"]
    special_tokens = {name: tokens[i] for key, name in _GGUF_NAMED.items() if (i := ids[key]) is not None}
    bos, bos_id = special_tokens.get("bos_token"), ids["bos"]
    if metadata.get("tokenizer.ggml.add_bos_token") and bos is not None:
        tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id)])
    named = [token_id for key in _GGUF_END_KEYS if (token_id := ids[key]) is not None]
    ends = dict.fromkeys(named + [token_id for token_id, token in enumerate(tokens) if token in _END_NAMES])
    if {"<|return|>", "<|call|>"} <= {tokens[token_id] for token_id in ends}:  # there <|end|> ends a message only
        ends = {token_id: None for token_id in ends if tokens[token_id] != "<|end|>"}
    return TokenizerFiles(tokenizer, templates_of_gguf(metadata), special_tokens, tuple(ends))


def _gguf_tokenizer(metadata: Mapping[str, Any], pre_tokenizer: PreTokenizer) -> Tokenizer:
    tokens: Sequence[str] = metadata["tokenizer.ggml.tokens"]
    merges = [str(merge).partition(" ") for merge in metadata.get("tokenizer.ggml.merges", ())]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, [(left, right) for left, _, right in merges]))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = ByteLevelDecoder()
    kinds = metadata.get("tokenizer.ggml.token_type", ())
    for kind, add in ((_CONTROL, tokenizer.add_special_tokens), (_USER_DEFINED, tokenizer.add_tokens)):
        added = [token for token, k in zip(tokens, kinds, strict=False) if k == kind]
        add([AddedToken(token, special=kind == _CONTROL, normalized=False) for token in added])
    return tokenizer


def _token_id(metadata: Mapping[str, Any], key: str, path: Path) -> int | None:
    """None where the file names no token of its vocabulary; converters write -1 for "none"."""
    name = f"tokenizer.ggml.{key}_token_id"
    value = metadata.get(name)
    if value is not None and not isinstance(value, int):
        raise ModelError(f"{path}: {name}: expected a token id, found {value!r}")
    return value if value is not None and 0 <= value < len(metadata["tokenizer.ggml.tokens"]) else None


def _smollm() -> PreTokenizer:
    """Every digit alone, then GPT-2's split into words."""
    return PreTokenizers([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)])


def _gpt2() -> PreTokenizer:
    return ByteLevel(add_prefix_space=False, use_regex=True)


_PRE_TOKENIZERS = {"smollm": _smollm, "gpt-2": _gpt2}
