"""Where a model keeps its chat templates, and which place counts. Sources only: `afd.gateway.templating` renders them.

A model has one template, or several by name: "default", "tool_use" for requests with tools; others are not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afd.errors import ModelError
from afd.model.model_files import read_json_object, read_text

DEFAULT = "default"
TOOL_USE = "tool_use"
MAX_TEMPLATE_BYTES = 1 << 20
_FOLDER, _MAX_FILES = "additional_chat_templates", 64
_GGUF_KEY = "tokenizer.chat_template"


def templates_of_folder(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Name -> Jinja source; empty = none. ModelError for what is no template.

    As transformers has it, files count before tokenizer_config.json: chat_template.jinja is the default one, those in
    additional_chat_templates/ have their names. chat_template.json, of models with images, counts where neither is.
    """
    templates = _template_files(folder)
    if templates:
        return templates
    templates = _named(tokenizer_config.get("chat_template"), folder / "tokenizer_config.json")
    if templates:
        return templates
    legacy = read_json_object(folder, "chat_template.json") or {}
    return _named(legacy.get("chat_template"), folder / "chat_template.json")


def templates_of_gguf(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Name -> Jinja source, from the keys tokenizer.chat_template and tokenizer.chat_template.NAME."""
    keys = {key: key.removeprefix(_GGUF_KEY + ".") for key in metadata if key.startswith(_GGUF_KEY + ".")}
    keys[_GGUF_KEY] = DEFAULT
    return {name: metadata[key] for key, name in keys.items() if isinstance(metadata.get(key), str)}


def _template_files(folder: Path) -> dict[str, str]:
    files = {DEFAULT: "chat_template.jinja"}
    if (folder / _FOLDER).is_dir():
        names = sorted(path.name for path in (folder / _FOLDER).glob("*.jinja"))
        if len(names) > _MAX_FILES:
            raise ModelError(f"{folder / _FOLDER}: {len(names)} templates; at most {_MAX_FILES}")
        files |= {name.removesuffix(".jinja"): f"{_FOLDER}/{name}" for name in names}
    return {
        name: source
        for name, file in files.items()
        if (source := read_text(folder, file, MAX_TEMPLATE_BYTES)) is not None
    }


def _named(value: object, where: Path) -> dict[str, str]:
    """A string, an object of named templates, or a list of objects with `name` and `template`."""
    if value is None:
        return {}
    if isinstance(value, str):
        value = {DEFAULT: value}
    elif isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if not isinstance(value, dict) or not all(isinstance(text, str) for pair in value.items() for text in pair):
        raise ModelError(f"{where}: chat_template: expected a text, or templates by name")
    return value
